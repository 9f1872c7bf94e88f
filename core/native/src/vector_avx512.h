// What the AVX-512 kernels for a few vectors share.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

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

// What is asked for beside rows that are read: `data` for the first of them, each later one's by `row` bytes on, and by
// `turn` bytes when 64 of each were read; their scales one after the other.
struct Soon {
    const uint8_t *data, *scales;
    int64_t row, turn;
};

// Whether rows are asked for into the first cache: where a group of them, what is asked for and x have room in it.
inline bool is_near(const Matrix& m, const Vectors& x, int64_t side) {
    constexpr int64_t GROUP_IN_32_KB = 6144, GROUP_IN_48_KB = 16384;
    return x.count == 1 && side * bytes_of_row(m) <= (has_large_first_cache() ? GROUP_IN_48_KB : GROUP_IN_32_KB);
}

// How many rows that follow each other to read side by side, four or two, for one vector. On Zen 5 four are as quick as memory
// while they are short, and two, which do not hide as much of the work, where four are not.
inline int64_t side_for(const Matrix& m, const Vectors& x) {
    constexpr int64_t SHORT = 512;
    if (has_large_first_cache()) return bytes_of_row(m) <= SHORT ? 4 : 2;
    return m.kind == INT8 && !is_near(m, x, 4) && is_near(m, x, 2) ? 2 : 4;
}

// The order in which a call reads its rows, `side` of them side by side, and what it asks for meanwhile: rows that come a few
// KB later, or what follows the last one; themselves again where nothing does, which costs nothing. That goes into the first
// cache where it has room there, else into the second and further ahead: the wrong one of both costs from a twentieth to a
// half.
//
// APART: rows side by side lie `step` apart, each in a page of its own, and so do those that are asked for. Intel's look ahead
// in each page of 4 KB by themselves, and in one page at a time two cores get three quarters of what they get in eight
// (benchmarks/large_pages.py). Elsewhere they follow each other, and what is asked for goes from front to back: two streams
// are slower there.
template <bool APART>
class Order {
public:
    Order(const Matrix& m, const Vectors& x, int64_t last, int64_t side)
        : side_(side), bytes_(bytes_of_row(m)), scales_(bytes_of_scales(m)),
          groups_(std::max<int64_t>(1, (is_near(m, x, side) ? near_ahead(m) : FAR_AHEAD) / (side * bytes_))),
          last_(last), own_(ahead_of(m, 0)), then_(x.ahead) {}

    // For the rows from `row` on, which follow each other.
    LMX_INLINE Soon soon(int64_t row) const {
        const int64_t ahead = row + side_ * groups_;
        return {place(own_.data, then_.data, row, ahead, bytes_), place(own_.scales, then_.scales, row, ahead, scales_), LINE,
                side_ * LINE};
    }

    // Of the block of side * step rows that begins at `row`; 0 where fewer than `side` are left.
    LMX_INLINE int64_t step(int64_t row) const {
        return std::min((PAGE + bytes_ - 1) / bytes_, (last_ - row) / side_);
    }

    // For group `group` of the block at `row`, whose rows lie apart.
    LMX_INLINE Soon soon(int64_t row, int64_t group, int64_t step) const {
        const int64_t later = group + groups_, ahead = row + later / step * side_ * step + later % step;
        const int64_t scales_ahead = row + group * side_ + side_ * std::max(step, groups_);
        return {place(own_.data, then_.data, row, ahead, bytes_), place(own_.scales, then_.scales, row, scales_ahead, scales_),
                step * bytes_, LINE};
    }

private:
    static constexpr int64_t PAGE = 4096, LINE = 64, FAR_AHEAD = 24576;
    // Bytes of int8 are done with sooner than bytes of codes.
    static int64_t near_ahead(const Matrix& m) {
        return m.kind == INT8 || (!APART && has_large_first_cache()) ? 8192 : 5120;
    }
    LMX_INLINE const uint8_t* place(const uint8_t* own, const uint8_t* then, int64_t row, int64_t ahead, int64_t bytes) const {
        if (ahead < last_) return own + ahead * bytes;
        return then ? then + (ahead - last_) * bytes : own + row * bytes;
    }
    const int64_t side_, bytes_, scales_;
    const int64_t groups_, last_;
    const Ahead own_, then_;
};

// Calls rows(side, row, step, soon) for groups of SIDE rows, and of one where fewer are left; `side` is a constant, and so is
// `step` where rows follow each other.
template <int SIDE, bool APART, typename Rows>
LMX_INLINE LMX_AVX512 void for_rows(const Matrix& m, const Vectors& x, int64_t first, int64_t last, const Rows& rows) {
    constexpr std::integral_constant<int, SIDE> side;
    constexpr std::integral_constant<int, 1> one;
    const Order<APART> order(m, x, last, SIDE);
    int64_t row = first;
    if constexpr (APART) {
        for (int64_t step; (step = order.step(row)); row += SIDE * step)
            for (int64_t i = 0; i < step; ++i) rows(side, row + i, step, order.soon(row, i, step));
    } else {
        for (; row + SIDE <= last; row += SIDE) rows(side, row, one, order.soon(row));
    }
    if constexpr (SIDE > 1) {
        const Order<false> last_order(m, x, last, 1);
        for (; row < last; ++row) rows(one, row, one, last_order.soon(row));
    }
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

// Of a four-bit matrix that is multiplied in digits: its kernel keeps the scales of x in 4 KB.
constexpr int64_t MOST_DIGIT_COLUMNS = 1024 * UNIT;

#define LMX_BY_COUNT(NAME, ONE, TWO, THREE, FOUR)                                                               \
    void NAME(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t out_stride) { \
        static constexpr RowsFunction by_count[] = {ONE, TWO, THREE, FOUR};                                     \
        by_count[x.count - 1](m, x, first, last, out, out_stride);                                              \
    }

void avx512_four_bit_bf16(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t stride);
void avx512_four_bit_digits(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t stride);
void avx512_int8_whole(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t stride);
void avx512_four_bit_f32(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t stride);

}  // namespace lmx

#endif
