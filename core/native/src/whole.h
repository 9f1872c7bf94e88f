// Vectors in 16-bit whole numbers, for CPUs that are quicker with pairs of those than with pairs of bf16: so are Intel's
// that have AMX, whose designers left bf16 to tiles (`vpdpwssd` takes a quarter of the time of `vdpbf16ps`). They are also
// closer to x: 15 bits of the largest of 128 elements, where bf16 keeps 8 of each.
#pragma once

#include "exponential.h"
#include "vector.h"

#if defined(LMX_X86)

namespace lmx {

// The largest magnitude of some elements, infinite or no number where one of them is.
struct Largest {
    uint32_t bits;
    bool is_finite() const { return bits < 0x7f800000; }
    // Elements become whole numbers up to `most` by multiplication with inverse(most), and are these times scale(most).
    // Those beside which 1e-33 is large count as zeros.
    float inverse(float most) const { return is_finite() && value() > 1e-33f ? most / value() : 0; }
    float scale(float most) const { return is_finite() ? value() / most : value(); }

private:
    float value() const {
        float out;
        std::memcpy(&out, &bits, 4);
        return out;
    }
};

template <int COUNT>
LMX_AVX512 LMX_INLINE Largest largest_of(const float* x) {
    __m512i most = _mm512_setzero_si512();
    for (int i = 0; i < COUNT; i += 16)
        most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_loadu_si512(x + i), _mm512_set1_epi32(0x7fffffff)));
    return {_mm512_reduce_max_epu32(most)};
}

// 1 and -1 where x is infinite, else 0.
LMX_AVX512 LMX_INLINE __m512i signs_of_infinite(__m512 x) {
    const __m512i raw = _mm512_castps_si512(x), magnitude = _mm512_and_si512(raw, _mm512_set1_epi32(0x7fffffff));
    const __mmask16 infinite = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
    return _mm512_maskz_or_epi32(infinite, _mm512_srai_epi32(raw, 31), _mm512_set1_epi32(1));
}

// Two units: x = values * scale. Where one is infinite so is the scale, and its value a sign, all others 0; where one is
// no number, so is the scale.
struct alignas(512) WholePair {
    static constexpr float MOST = 32767;
    int16_t values[2 * UNIT];
    float scale;
};
static_assert(sizeof(WholePair) == 2 * UNIT * 4, "as size_of(Layout) says");

LMX_AVX512 LMX_INLINE void put_whole_pair(const float* x, WholePair& out) {
    const Largest largest = largest_of<2 * UNIT>(x);
    const __m512 inverse = _mm512_set1_ps(largest.inverse(WholePair::MOST));
    for (int i = 0; i < 2 * UNIT; i += 16) {
        const __m512 some = _mm512_loadu_ps(x + i);
        __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(some, inverse));
        if (!largest.is_finite()) whole = signs_of_infinite(some);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out.values + i), _mm512_cvtsepi32_epi16(whole));
    }
    out.scale = largest.scale(WholePair::MOST);
}

// weight times an element, value * scale, added to a sum as floats would be: for answers that are not finite.
inline float add_exactly(float sum, float weight, float value, float scale) {
    if (value == 0 && scale > 3e38f) return sum;  // finite, beside something infinite
    return sum + weight * (value * scale);
}

}  // namespace lmx

#endif
