// What the AVX-512 kernels for a few vectors share.
#pragma once

#include <algorithm>

#include "exponential.h"
#include "vector.h"

#if defined(LMX_X86)

namespace lmx {

// Into the second cache: the first has no room for a group of wide rows, the next group and x, so that those asked for
// into it took longer.
// Always inline: a call of a function that does nothing but this is taken for one that does nothing.
LMX_INLINE LMX_AVX512 void prefetch(const uint8_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1); }

// How far ahead of themselves rows that lie side by side are asked for, in whole groups of rows. Twice as much took
// longer, by a tenth where rows are wide.
LMX_INLINE int64_t rows_ahead(int64_t side, int64_t bytes) {
    constexpr int64_t AHEAD = 24576;
    return side * std::max<int64_t>(1, AHEAD / (side * bytes));
}

// What is asked for beside the rows from `row` on: those so many later, or what follows the last of this call; themselves
// again where nothing does, which costs nothing.
LMX_INLINE Ahead soon_after(const Matrix& m, const Vectors& x, int64_t row, int64_t last, int64_t ahead) {
    const int64_t behind = row + ahead - last;
    if (behind < 0) return ahead_of(m, row + ahead);
    Ahead soon = ahead_of(m, row);
    if (x.ahead.data) soon.data = x.ahead.data + behind * bytes_of_row(m);
    if (x.ahead.scales) soon.scales = x.ahead.scales + behind * bytes_of_scales(m);
    return soon;
}

// 16 values, twice.
LMX_INLINE LMX_AVX512 __m512i table_of(const bf16* values) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
}

LMX_INLINE LMX_AVX512 __m256 halved(__m512 x) {
    return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
}

// The sum of each, all four by one tree: the same order of additions whatever stands beside.
LMX_INLINE LMX_AVX512 __m128 sums_of_four(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m256 pairs = _mm256_hadd_ps(halved(a), halved(b)), others = _mm256_hadd_ps(halved(c), halved(d));
    const __m256 sums = _mm256_hadd_ps(pairs, others);
    return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}

#define LMX_BY_COUNT(NAME, ONE, TWO, THREE, FOUR)                                                               \
    void NAME(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t out_stride) { \
        static constexpr RowsFunction by_count[] = {ONE, TWO, THREE, FOUR};                                     \
        by_count[x.count - 1](m, x, first, last, out, out_stride);                                              \
    }

void avx512_four_bit_bf16(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t stride);
void avx512_four_bit_f32(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t stride);

}  // namespace lmx

#endif
