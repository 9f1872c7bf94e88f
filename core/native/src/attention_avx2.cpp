// Attention of one token with AVX2.
#include "lmx_native.h"

#if defined(LMX_X86)
#define LMX_TARGET LMX_AVX2
#define LMX_FUSED _mm256_fmadd_ps
namespace {
constexpr int LANES = 8, REGISTERS = 16;
}
#include "attention_path.h"

lmx::AttentionPath lmx::avx2_attention(Dtype dtype) { return path_of(dtype); }
#endif
