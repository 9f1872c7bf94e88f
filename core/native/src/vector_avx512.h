// What the AVX-512 kernels for a few vectors share.
#pragma once

#include <algorithm>
#include <cmath>

#include "exponential.h"
#include "vector.h"

#if defined(LMX_X86)

namespace lmx {

// 64 bytes, loaded where this stands among the other loads and prefetches that are written so: rows side by side must be
// read in the order in which they lie. Where a compiler sorts them otherwise, the hardware's own look ahead goes astray,
// which costs a tenth.
LMX_INLINE LMX_AVX512 __m512i load_in_order(const uint8_t* at) {
    __m512i out;
    asm volatile("vmovdqu64 %1, %0" : "=v"(out) : "m"(*reinterpret_cast<const __m512i_u*>(at)));
    return out;
}

// NEAR: into the first cache, else the second.
template <bool NEAR>
LMX_INLINE LMX_AVX512 void prefetch(const uint8_t* at) {
    if constexpr (NEAR) asm volatile("prefetcht0 %0" : : "m"(*at));
    else asm volatile("prefetcht1 %0" : : "m"(*at));
}

// What is asked for beside rows that are read: those a few KB later, in whole groups of `side` rows, or what follows the
// last row of the call; themselves again where nothing does, which costs nothing.
//
// Into the first cache where a group of rows, what is asked for and x have room in it, else into the second and further
// ahead: the wrong one of both costs from a twentieth to a half.
class Soon {
public:
    Soon(const Matrix& m, const Vectors& x, int64_t last, int64_t side)
        : bytes_(bytes_of_row(m)), scales_(bytes_of_scales(m)),
          rows_(side * std::max<int64_t>(1, (is_near(m, x, side) ? near_ahead(m) : FAR_AHEAD) / (side * bytes_))),
          last_(last), own_(ahead_of(m, 0)), then_(x.ahead) {}

    static bool is_near(const Matrix& m, const Vectors& x, int64_t side) {
        return x.count == 1 && side * bytes_of_row(m) <= NEAR_GROUP;
    }

    LMX_INLINE Ahead at(int64_t row) const {
        const int64_t behind = row + rows_ - last_;
        if (behind < 0) return {own_.data + (row + rows_) * bytes_, own_.scales + (row + rows_) * scales_};
        return {then_.data ? then_.data + behind * bytes_ : own_.data + row * bytes_,
                then_.scales ? then_.scales + behind * scales_ : own_.scales + row * scales_};
    }

private:
    static constexpr int64_t NEAR_GROUP = 6144, FAR_AHEAD = 24576;
    // Bytes of int8 are done with sooner than bytes of codes.
    static int64_t near_ahead(const Matrix& m) { return m.kind == INT8 ? 8192 : 5120; }
    const int64_t bytes_, scales_, rows_, last_;
    const Ahead own_, then_;
};

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

// Answers that are not finite, once more by `exactly(m, x, row, vector)`: what a kernel splits or scales can be infinity less
// infinity where the whole is not.
template <typename Exactly>
void compute_again(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t out_stride,
                   const Exactly& exactly) {
    for (int64_t row = first; row < last; ++row)
        for (int64_t v = 0; v < x.count; ++v) {
            float& answer = out[v * out_stride + row - first];
            if (!std::isfinite(answer)) answer = exactly(m, x, row, v);
        }
}

#define LMX_BY_COUNT(NAME, ONE, TWO, THREE, FOUR)                                                               \
    void NAME(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t out_stride) { \
        static constexpr RowsFunction by_count[] = {ONE, TWO, THREE, FOUR};                                     \
        by_count[x.count - 1](m, x, first, last, out, out_stride);                                              \
    }

void avx512_four_bit_bf16(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t stride);
void avx512_four_bit_whole(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t stride);
void avx512_int8_whole(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t stride);
void avx512_four_bit_f32(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t stride);

}  // namespace lmx

#endif
