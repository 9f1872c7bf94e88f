// Vectors in 16-bit whole numbers, for CPUs that are quicker with pairs of those than with pairs of bf16: so are Intel's
// that have AMX, whose designers left bf16 to tiles (`vpdpwssd` takes a quarter of the time of `vdpbf16ps`). They are also
// closer to x: 15 bits of the largest of 128 elements, where bf16 keeps 8 of each.
#pragma once

#include "decode.h"

#if defined(LMX_X86)

namespace lmx {

// Two units: x = values * scale. Where one is infinite so is the scale, and its value a sign, all others 0; where one is
// no number, so is the scale.
struct alignas(512) WholePair {
    static constexpr float MOST = 32767;
    int16_t values[2 * UNIT];
    float scale;
};
static_assert(sizeof(WholePair) == 2 * UNIT * 4, "as size_of(Layout) says");

// quartered: in the order QUARTERED_BF16. Elements beside which 1e-33 is large count as zeros.
LMX_AVX512 LMX_INLINE WholePair whole_pair(const float* x, bool quartered_order) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff), infinity = _mm512_set1_epi32(0x7f800000);
    __m512i most = _mm512_setzero_si512();
    for (int i = 0; i < 2 * UNIT; i += 16)
        most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_loadu_si512(x + i), magnitude));
    const uint32_t bits = _mm512_reduce_max_epu32(most);
    float largest;
    std::memcpy(&largest, &bits, 4);
    const bool finite = bits < 0x7f800000;
    const float inverse = !finite ? 0 : largest > 1e-33f ? WholePair::MOST / largest : 0;
    WholePair out;
    out.scale = finite ? largest / WholePair::MOST : largest;
    alignas(64) int16_t values[2 * UNIT];
    for (int i = 0; i < 2 * UNIT; i += 16) {
        const __m512 some = _mm512_loadu_ps(x + i);
        __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(some, _mm512_set1_ps(inverse)));
        if (!finite) {
            const __m512i raw = _mm512_castps_si512(some);
            const __mmask16 infinite = _mm512_cmpeq_epi32_mask(_mm512_and_si512(raw, magnitude), infinity);
            whole = _mm512_maskz_or_epi32(infinite, _mm512_srai_epi32(raw, 31), _mm512_set1_epi32(1));
        }
        _mm256_store_si256(reinterpret_cast<__m256i*>(values + i), _mm512_cvtsepi32_epi16(whole));
    }
    if (quartered_order) {
        const Quarters quarters = quartered(reinterpret_cast<const bf16*>(values));
        for (int i = 0; i < 4; ++i) _mm512_storeu_si512(out.values + 32 * i, quarters.part[i]);
    } else {
        std::memcpy(out.values, values, sizeof values);
    }
    return out;
}

// weight times element `place` of a pair, added to a sum, as floats would be: for answers that are not finite.
inline float add_exactly(float sum, float weight, const WholePair& pair, int64_t place) {
    const int16_t value = pair.values[place];
    if (value == 0 && pair.scale > 3e38f) return sum;  // finite, beside something infinite
    return sum + weight * (static_cast<float>(value) * pair.scale);
}

}  // namespace lmx

#endif
