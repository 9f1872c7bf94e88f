// Attention of one token with NEON, which every 64-bit ARM has: nothing to ask the compiler for.
#include "lmx_native.h"

#if defined(LMX_NEON)
#define LMX_TARGET
#define LMX_FUSED(a, b, c) vfmaq_f32(c, a, b)
namespace {
constexpr int LANES = 4, REGISTERS = 32;
}
#include "attention_path.h"

lmx::AttentionPath lmx::neon_attention(Dtype dtype) { return path_of(dtype); }
#endif
