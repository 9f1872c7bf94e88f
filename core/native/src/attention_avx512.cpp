// Attention of one token with AVX-512.
#include "lmx_native.h"

#if defined(LMX_X86)
#define LMX_TARGET LMX_AVX512
#define LMX_FUSED _mm512_fmadd_ps
namespace {
constexpr int LANES = 16, REGISTERS = 32;
}
#include "attention_path.h"

lmx::AttentionPath lmx::avx512_attention(Dtype dtype) { return path_of(dtype); }
#endif
