// Matrices times many vectors with AVX-512's BF16 instructions.
#include <algorithm>

#include "decode.h"
#include "scratch.h"

#if defined(LMX_X86)

namespace lmx {
namespace {

// Vectors whose products with a row are summed in registers together, at most, and rows, each with so many vectors: 24 of
// 32 registers hold sums.
constexpr int64_t AT_ONCE = 6, ROWS = 4;
// Rows that are decoded at a time, 128 KB of them: they stay in the second cache while all vectors pass by. With longer
// stretches of columns Zen 5, which multiplies twice as fast as its second cache can follow, waits for that; shorter ones cost
// more additions across registers at their ends than they save.
constexpr int64_t ROWS_AT_ONCE = 64;
// Below so many vectors the rows that were decoded had better be in the first cache still: four at a time.
constexpr int64_t FEW = 16;

// For each stretch of DEPTH columns, for each group of vectors (the last may be smaller), panels hold one step of every
// vector, the next step of every vector, and so on.
//
// Groups are even rather than full: eight vectors are four and four, since two would leave the registers half empty.
int64_t group_size(int64_t vectors) {
    const int64_t groups = (vectors + AT_ONCE - 1) / AT_ONCE;
    return (vectors + groups - 1) / groups;
}

// The sums of four registers.
LMX_AVX512 LMX_INLINE __m128 sums_of(__m512 s, __m512 t, __m512 u, __m512 v) {
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(s, t), _mm512_unpackhi_ps(s, t));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(u, v), _mm512_unpackhi_ps(u, v));
    const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
    const __m512 quarters = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)),
                                          _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
    const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

// ROWS rows times VECTORS vectors over `depth` columns, added to `out` or, in the first stretch, put there.
template <int VECTORS>
LMX_AVX512 void multiply_tile(const bf16* weights, const bf16* x, int64_t depth, bool first, float* out,
                              int64_t out_stride) {
    __m512 sums[VECTORS][ROWS];
    // Asked for in words: left alone, the compiler keeps the sums in memory before and after the loop.
#pragma GCC unroll 24
    for (int i = 0; i < VECTORS * ROWS; ++i) sums[i / ROWS][i % ROWS] = _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; k += STEP, weights += ROWS * STEP, x += VECTORS * STEP) {
        __m512bh vectors[VECTORS];
        for (int v = 0; v < VECTORS; ++v) vectors[v] = (__m512bh)_mm512_load_si512(x + v * STEP);
        for (int r = 0; r < ROWS; ++r) {
            const __m512bh row = (__m512bh)_mm512_load_si512(weights + r * STEP);
            for (int v = 0; v < VECTORS; ++v) sums[v][r] = _mm512_dpbf16_ps(sums[v][r], row, vectors[v]);
        }
    }
#pragma GCC unroll 6
    for (int v = 0; v < VECTORS; ++v) {
        float* to = out + v * out_stride;
        const __m128 total = sums_of(sums[v][0], sums[v][1], sums[v][2], sums[v][3]);
        _mm_storeu_ps(to, first ? total : _mm_add_ps(_mm_loadu_ps(to), total));
    }
}

using TileFunction = void (*)(const bf16*, const bf16*, int64_t, bool, float*, int64_t);
constexpr TileFunction TILES[AT_ONCE] = {multiply_tile<1>, multiply_tile<2>, multiply_tile<3>,
                                         multiply_tile<4>, multiply_tile<5>, multiply_tile<6>};

LMX_AVX512 void pack(const bf16* x, int64_t first, int64_t count, int64_t columns, int64_t index, int64_t vectors,
                     bf16* panel) {
    const int64_t size = group_size(vectors), group = index / size * size, together = std::min(size, vectors - group);
    for (int64_t c = first; c < first + count; c += 2 * UNIT) {
        const int64_t start = c / DEPTH * DEPTH, depth = packed_columns(std::min(DEPTH, columns - start));
        bf16* out = panel + start * vectors + group * depth + (c - start) * together + (index - group) * STEP;
        const Quarters quarters = quartered(x + c - first, first + count - c);
        for (int i = 0; i < 4; ++i) _mm512_storeu_si512(out + i * together * STEP, quarters.part[i]);
    }
}

void multiply(const Matrix& m, const bf16* panel, int64_t count, int64_t first, int64_t last, float* out,
              int64_t out_stride) {
    static thread_local Kept<bf16> weights(ROWS_AT_ONCE * DEPTH);
    const int64_t at_once = count <= FEW ? ROWS : ROWS_AT_ONCE, size = group_size(count);
    for (int64_t row = first; row < last; row += at_once) {
        const int64_t end = std::min(row + at_once, last);
        for (int64_t c = 0; c < m.columns; c += DEPTH) {
            const int64_t stop = std::min(c + DEPTH, m.columns), depth = packed_columns(stop - c);
            decode_rows(m, row, end, c, stop, ROWS, weights.data());
            for (int64_t v = 0; v < count; v += size) {
                const TileFunction tile = TILES[std::min(size, count - v) - 1];
                for (int64_t r = row; r < end; r += ROWS)
                    tile(weights.data() + (r - row) * depth, panel + c * count + v * depth, depth, c == 0,
                         out + v * out_stride + r - first, out_stride);
            }
        }
    }
    scale_int8(m, count, first, last, out, out_stride);
}

}  // namespace

const Panels avx512_panels{UNIT, pack, multiply};

}  // namespace lmx

#endif
