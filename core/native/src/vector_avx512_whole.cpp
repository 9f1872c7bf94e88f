// Matrices of int8 times a few vectors of 16-bit whole numbers with AVX-512.
#include "vector_avx512.h"
#include "whole.h"

#if defined(LMX_X86)

namespace lmx {
namespace {

constexpr int64_t PAIR = 2 * UNIT;

// 32 bytes as 32 whole numbers, where this stands among other loads (load_in_order).
LMX_INLINE LMX_AVX512 __m512i widened_in_order(const uint8_t* at) {
    __m512i out;
    asm volatile("vpmovsxbw %1, %0" : "=v"(out) : "m"(*reinterpret_cast<const __m256i_u*>(at)));
    return out;
}

template <int ROWS, int VECTORS, bool NEAR>
LMX_AVX512 LMX_INLINE void int8_rows(const Matrix& m, const Vectors& x, int64_t row, int64_t step, Soon soon, float* out,
                                     int64_t out_stride) {
    const auto* vectors = static_cast<const WholePair*>(x.data);
    const uint8_t* weights = m.data + row * m.columns;
    __m512 sums[ROWS][VECTORS];
    for (auto& of_row : sums)
        for (auto& sum : of_row) sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < m.columns; c += PAIR, soon.data += 2 * soon.turn) {
        __m512i values[ROWS][4];
        for (int r = 0; r < ROWS; ++r) {
            prefetch<NEAR>(soon.data + r * soon.row);
            prefetch<NEAR>(soon.data + r * soon.row + soon.turn);
            for (int i = 0; i < 4; ++i) values[r][i] = widened_in_order(weights + r * step * m.columns + c + 32 * i);
        }
        for (int v = 0; v < VECTORS; ++v) {
            const WholePair& pair = vectors[(v * x.stride + c) / PAIR];
            __m512i of_pair[ROWS];
            for (auto& sum : of_pair) sum = _mm512_setzero_si512();
            for (int i = 0; i < 4; ++i) {
                const __m512i vector = _mm512_load_si512(pair.values + 32 * i);
                for (int r = 0; r < ROWS; ++r) of_pair[r] = _mm512_dpwssd_epi32(of_pair[r], values[r][i], vector);
            }
            const __m512 scale = _mm512_set1_ps(pair.scale);
            for (int r = 0; r < ROWS; ++r)
                sums[r][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(of_pair[r]), scale, sums[r][v]);
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        const float scale = static_cast<const float*>(m.absmax)[row + r * step] * INVERSE_127;
        for (int v = 0; v < VECTORS; ++v) out[v * out_stride + r * step] = scale * _mm512_reduce_add_ps(sums[r][v]);
    }
}

// A row times one vector, element by element.
float row_exactly(const Matrix& m, const Vectors& x, int64_t row, int64_t v) {
    const auto* pairs = static_cast<const WholePair*>(x.data) + v * x.stride / PAIR;
    const auto* weights = reinterpret_cast<const int8_t*>(m.data) + row * m.columns;
    float sum = 0;
    for (int64_t c = 0; c < m.columns; ++c) {
        const WholePair& pair = pairs[c / PAIR];
        sum = add_exactly(sum, static_cast<float>(weights[c]), static_cast<float>(pair.values[c % PAIR]), pair.scale);
    }
    return sum * static_cast<const float*>(m.absmax)[row] * INVERSE_127;
}

template <int SIDE, int VECTORS, bool NEAR>
LMX_AVX512 void int8_all(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out,
                         int64_t out_stride) {
    for_rows<SIDE, true>(m, x, first, last, [&](auto side, int64_t row, auto step, Soon soon) LMX_AVX512 {
        int8_rows<side(), VECTORS, NEAR>(m, x, row, step, soon, out + row - first, out_stride);
    });
    compute_again(m, x, first, last, out, out_stride, row_exactly);
}

template <int VECTORS>
void int8_of(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t out_stride) {
    constexpr int SIDE = VECTORS == 1 ? 4 : 2;
    if (is_near(m, x, SIDE)) return int8_all<SIDE, VECTORS, true>(m, x, first, last, out, out_stride);
    int8_all<SIDE, VECTORS, false>(m, x, first, last, out, out_stride);
}

}  // namespace

LMX_BY_COUNT(avx512_int8_whole, int8_of<1>, int8_of<2>, int8_of<3>, int8_of<4>)

}  // namespace lmx

#endif
