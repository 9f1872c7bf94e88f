// Vectors in digits of eight bits, two for an element, for CPUs that multiply bytes faster than pairs of bf16.
//
// Let an element be a + r, a the nearest whole number, and a weight b + s. Two products of bytes then give what else takes
// four: 16 * a * b + (a + 17 * r) * (b + 17 * s) = 17 * (a + r) * (b + s) + 272 * r * s. The last term is what it costs, for
// no remainder is larger than 1/2, and rounding the second factors: all in all less than what rounding the answer to bf16
// costs, with outliers too (tests/core/native/test_digits.py).
#pragma once

#include "whole.h"

#if defined(LMX_X86)

namespace lmx {

// Largest of the nearest whole numbers, so that fine digits (MOST + 17 / 2) are bytes too.
constexpr int MOST_DIGIT = 118;
// How much more the products of coarse digits count, as a power of two.
constexpr int DIGIT_SHIFT = 4, DIGIT_RATIO = 1 << DIGIT_SHIFT;

// Two units, as 64 bytes of codes meet them: first the low nibbles, to which the odd elements belong. A unit's elements are
// its digits times its scale; where one is infinite so is the scale, and its digits a sign, all others 0; where one is no
// number, so is the scale.
struct alignas(512) DigitPair {
    int8_t coarse[2][UNIT], fine[2][UNIT];
    int32_t start[16];  // what sums begin with
    float scales[2];

    // Bytes of weights are so much above what they stand for, since one factor must have no sign.
    static constexpr int ABOVE = 128;

    float value(int64_t place) const {
        const int64_t low = place & 1, at = place / 2;
        return static_cast<float>(DIGIT_RATIO * coarse[!low][at] + fine[!low][at]) * (1.0f / (DIGIT_RATIO + 1));
    }
};
static_assert(sizeof(DigitPair) == 2 * UNIT * 4, "as size_of(Layout) says");

// The digits of a unit x [64], one byte each. Returns its scale.
LMX_AVX512 LMX_INLINE float put_digits(const float* x, int8_t* coarse, int8_t* fine) {
    const Largest largest = largest_of<UNIT>(x);
    const __m512 inverse = _mm512_set1_ps(largest.inverse(MOST_DIGIT));
    for (int i = 0; i < UNIT; i += 16) {
        const __m512 some = _mm512_loadu_ps(x + i);
        const __m512 scaled = _mm512_mul_ps(some, inverse), nearest = _mm512_roundscale_ps(scaled, 0);
        const __m512 weighted = _mm512_mul_ps(nearest, _mm512_set1_ps(DIGIT_RATIO));
        __m512i first = _mm512_cvtps_epi32(nearest);
        __m512i second = _mm512_cvtps_epi32(_mm512_fmsub_ps(scaled, _mm512_set1_ps(DIGIT_RATIO + 1), weighted));
        if (!largest.is_finite()) first = second = signs_of_infinite(some);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(coarse + i), _mm512_cvtepi32_epi8(first));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(fine + i), _mm512_cvtepi32_epi8(second));
    }
    return largest.scale(MOST_DIGIT);
}

// Every second of 128 bytes, from the second on and from the first on.
LMX_AVX512 LMX_INLINE void put_odd_and_even(const int8_t* bytes, int8_t (*out)[UNIT]) {
    for (int half = 0; half < 2; ++half) {
        const __m512i words = _mm512_loadu_si512(bytes + UNIT * half);
        const __m256i odd = _mm512_cvtepi16_epi8(_mm512_srli_epi16(words, 8)), even = _mm512_cvtepi16_epi8(words);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out[0] + 32 * half), odd);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out[1] + 32 * half), even);
    }
}

// What lies in each 32 bits of two rows of bytes, added up.
LMX_AVX512 LMX_INLINE __m512i sums_of_lanes(const int8_t (*rows)[UNIT]) {
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < 2; ++i) sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(rows[i]));
    return sum;
}

LMX_AVX512 LMX_INLINE void put_digit_pair(const float* x, DigitPair& out) {
    alignas(64) int8_t coarse[2 * UNIT], fine[2 * UNIT];
    for (int unit = 0; unit < 2; ++unit)
        out.scales[unit] = put_digits(x + UNIT * unit, coarse + UNIT * unit, fine + UNIT * unit);
    put_odd_and_even(coarse, out.coarse);
    put_odd_and_even(fine, out.fine);
    // Products of coarse digits are shifted before those of fine ones are added, and so is this.
    const __m512i of_coarse = _mm512_mullo_epi32(sums_of_lanes(out.coarse), _mm512_set1_epi32(-DigitPair::ABOVE));
    const __m512i of_fine =
        _mm512_mullo_epi32(sums_of_lanes(out.fine), _mm512_set1_epi32(-DigitPair::ABOVE / DIGIT_RATIO));
    _mm512_storeu_si512(out.start, _mm512_add_epi32(of_coarse, of_fine));
}

}  // namespace lmx

#endif
