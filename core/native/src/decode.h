// Rows of a matrix as bf16, in the order in which AVX-512 and AMX multiply them by many vectors.
#pragma once

#include "exponential.h"
#include "matrix.h"

#if defined(LMX_X86)

namespace lmx {

// 128 elements of 16 bits in four registers, in the order QUARTERED_BF16.
struct Quarters {
    __m512i part[4];
};

LMX_AVX512 LMX_INLINE Quarters quartered(const bf16* x) {
    // From two registers: every fourth element from 1 on, then from 0 on; and from 3, then from 2.
    alignas(64) static const uint16_t low[32] = {1, 5, 9,  13, 17, 21, 25, 29, 33, 37, 41, 45, 49, 53, 57, 61,
                                                 0, 4, 8,  12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60};
    const __m512i first = _mm512_load_si512(low), second = _mm512_add_epi16(first, _mm512_set1_epi16(2));
    __m512i in[4];
    for (int i = 0; i < 4; ++i) in[i] = _mm512_loadu_si512(x + i * STEP);
    const __m512i a = _mm512_permutex2var_epi16(in[0], first, in[1]);
    const __m512i b = _mm512_permutex2var_epi16(in[2], first, in[3]);
    const __m512i c = _mm512_permutex2var_epi16(in[0], second, in[1]);
    const __m512i d = _mm512_permutex2var_epi16(in[2], second, in[3]);
    return {{_mm512_shuffle_i64x2(a, b, 0x44), _mm512_shuffle_i64x2(a, b, 0xee), _mm512_shuffle_i64x2(c, d, 0x44),
             _mm512_shuffle_i64x2(c, d, 0xee)}};
}

// The first `count` of 128 elements, and zeros.
LMX_AVX512 LMX_INLINE Quarters quartered(const bf16* x, int64_t count) {
    if (count >= 2 * UNIT) return quartered(x);
    alignas(64) bf16 some[2 * UNIT] = {};
    std::memcpy(some, x, static_cast<size_t>(count) * 2);
    return quartered(some);
}

// Decodes the rows first .. last, the columns start .. stop (`start` a multiple of 2 * UNIT, and at most DEPTH of them): for
// every `together` rows a step of each, the next step of each, and so on. What is missing of the last group's rows, and
// columns up to the next multiple of 2 * UNIT, are zeros.
void decode_rows(const Matrix& m, int64_t first, int64_t last, int64_t start, int64_t stop, int64_t together,
                 bf16* weights);

}  // namespace lmx

#endif
