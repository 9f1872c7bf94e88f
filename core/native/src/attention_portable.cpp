// Attention of one token on any CPU: the compiler makes of the vectors what it has.
#include "lmx_native.h"

#define LMX_TARGET
namespace {
constexpr int LANES = 4, REGISTERS = 16;
}
#include "attention_path.h"

lmx::AttentionPath lmx::portable_attention(Dtype dtype) { return path_of(dtype); }
