// Matrices times many vectors with AVX-512's BF16 instructions.
#include "matrix.h"

#include <algorithm>

#include "exponential.h"
#include "prepare.h"
#include "scratch.h"

#if defined(LMX_X86)

namespace lmx {
namespace {

// Rows that are summed in registers together, each with AT_ONCE vectors: 24 of 32 registers hold sums.
constexpr int64_t ROWS = 4;
constexpr int64_t PAIR = 2 * UNIT;
// Below so many vectors the rows that were decoded had better be in the first cache still: four at a time.
constexpr int64_t FEW = 16;
// Rows between the one that is decoded and the one that memory is asked for.
constexpr int64_t AHEAD = 8;

// 128 elements in four registers, brought into the order QUARTERED_BF16.
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

// Writes `count` elements a step at a time, `stride` elements from the last, and zeros up to a whole pair of units.
LMX_AVX512 void put_quartered(const bf16* x, int64_t count, int64_t stride, bf16* out) {
    for (int64_t c = 0; c < count; c += PAIR) {
        alignas(64) bf16 tail[PAIR] = {};
        const bool whole = c + PAIR <= count;
        if (!whole) std::memcpy(tail, x + c, static_cast<size_t>(count - c) * 2);
        const Quarters quarters = quartered(whole ? x + c : tail);
        for (int i = 0; i < 4; ++i) _mm512_storeu_si512(out + (c / STEP + i) * stride, quarters.part[i]);
    }
}

// The functions below decode the columns first .. last of a row. Like put_quartered they write steps that lie `stride`
// elements apart, and zeros at the end.

// Whole units, and blocks of at least one: a word holds four codes of a block.
LMX_AVX512 void decode_four_bit(const Matrix& m, int64_t row, int64_t first, int64_t last, int64_t stride, bf16* out) {
    const __m512 code = _mm512_loadu_ps(m.code);
    const __m512i nibble = _mm512_set1_epi16(15);
    const __m512i upper = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    const int shift = log2_of(m.block_size);
    const int64_t ahead = AHEAD * m.columns / 2;
    for (int64_t at = row * m.columns + first, end = row * m.columns + last; at < end; at += PAIR, out += 4 * stride) {
        const uint8_t* bytes = m.data + at / 2;
        _mm_prefetch(reinterpret_cast<const char*>(bytes + ahead), _MM_HINT_T1);
        const bool whole = at + PAIR <= end;
        const __m512i words = whole ? _mm512_loadu_si512(bytes)
                                    : _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
        const float low = block_scale(m, at >> shift), high = whole ? block_scale(m, (at + UNIT) >> shift) : 0.0f;
        // The values of either unit's codes: 16 for the lower half of the words, 16 for the upper.
        const __m512i values = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(code, _mm512_set1_ps(high)),
                                                            _mm512_mul_ps(code, _mm512_set1_ps(low)));
        const __m512i parts[] = {words, _mm512_srli_epi16(words, 4), _mm512_srli_epi16(words, 8),
                                 _mm512_srli_epi16(words, 12)};
        for (int i = 0; i < 4; ++i) {
            const __m512i codes = _mm512_ternarylogic_epi32(parts[i], nibble, upper, 0xea);  // part & nibble | upper
            _mm512_storeu_si512(out + i * stride, _mm512_permutexvar_epi16(codes, values));
        }
    }
}

// int8 is exact in bf16; its scale waits for the sum.
LMX_AVX512 void decode_int8(const Matrix& m, int64_t row, int64_t first, int64_t last, int64_t stride, bf16* out) {
    const auto* bytes = reinterpret_cast<const int8_t*>(m.data) + row * m.columns;
    alignas(64) bf16 values[PAIR];
    for (int64_t c = first; c < last; c += PAIR, out += 4 * stride) {
        const int64_t count = std::min(PAIR, last - c);
        int64_t i = 0;
        for (; i + STEP <= count; i += STEP) {
            const auto* at = reinterpret_cast<const __m128i*>(bytes + c + i);
            const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at)));
            const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at + 1)));
            _mm512_store_si512(values + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
        for (; i < count; ++i) values[i] = float_to_bf16(bytes[c + i]);
        put_quartered(values, count, stride, out);
    }
}

// Any matrix, one element after the other but for 16-bit floats.
LMX_AVX512 void decode_any(const Matrix& m, int64_t row, int64_t first, int64_t last, int64_t stride, bf16* out) {
    const int64_t start = row * m.columns + first, count = last - first;
    if (m.kind == KEPT_BF16) return put_quartered(reinterpret_cast<const bf16*>(m.data) + start, count, stride, out);
    alignas(64) bf16 values[DEPTH];
    if (m.kind == FOUR_BIT) {
        const int shift = log2_of(m.block_size);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t at = start + i;
            const uint8_t byte = m.data[at >> 1];
            values[i] = float_to_bf16(m.code[at & 1 ? byte & 15 : byte >> 4] * block_scale(m, at >> shift));
        }
    } else {
        const Dtype dtype = m.kind == KEPT_F32 ? F32 : F16;
        alignas(64) bf16 padded_values[DEPTH + STRETCH];
        prepare(m.data + start * size_of(dtype), dtype, count, PLAIN_BF16, padded_values);
        std::memcpy(values, padded_values, static_cast<size_t>(count) * 2);
    }
    put_quartered(values, count, stride, out);
}

using DecodeFunction = void (*)(const Matrix&, int64_t, int64_t, int64_t, int64_t, bf16*);

DecodeFunction decode_function(const Matrix& m) {
    if (m.kind == INT8) return decode_int8;
    return m.kind == FOUR_BIT && m.columns % UNIT == 0 && m.block_size >= UNIT ? decode_four_bit : decode_any;
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

// Rows of one stretch, decoded: for every ROWS of them a step of each, the next step of each, and so on.
void decode_rows(const Matrix& m, int64_t first, int64_t last, int64_t start, int64_t stop, bf16* weights) {
    const DecodeFunction decode = decode_function(m);
    const int64_t depth = packed_columns(stop - start);
    for (int64_t row = first; row < last; ++row) {
        const int64_t at = row - first;
        decode(m, row, start, stop, ROWS * STEP, weights + at / ROWS * ROWS * depth + at % ROWS * STEP);
    }
    for (int64_t at = last - first; at % ROWS; ++at)
        for (int64_t c = 0; c < depth; c += STEP)
            std::memset(weights + at / ROWS * ROWS * depth + at % ROWS * STEP + c * ROWS, 0, STEP * 2);
}

}  // namespace

bool has_panels() { return level() == AVX512; }

void pack(const bf16* x, int64_t first, int64_t count, int64_t columns, int64_t index, int64_t vectors, bf16* panel) {
    const int64_t size = group_size(vectors), group = index / size * size, together = std::min(size, vectors - group);
    for (int64_t c = first; c < first + count;) {
        const int64_t start = c / DEPTH * DEPTH, stop = std::min(start + DEPTH, first + count);
        const int64_t depth = packed_columns(std::min(DEPTH, columns - start));
        bf16* out = panel + start * vectors + group * depth + (c - start) * together + (index - group) * STEP;
        put_quartered(x + c - first, stop - c, together * STEP, out);
        c = stop;
    }
}

void multiply_panel(const Matrix& m, const bf16* panel, int64_t count, int64_t first, int64_t last, float* out,
                    int64_t out_stride) {
    static thread_local Scratch<bf16> weights(ROWS_AT_ONCE * DEPTH);
    const int64_t at_once = count <= FEW ? ROWS : ROWS_AT_ONCE, size = group_size(count);
    for (int64_t row = first; row < last; row += at_once) {
        const int64_t end = std::min(row + at_once, last);
        for (int64_t c = 0; c < m.columns; c += DEPTH) {
            const int64_t stop = std::min(c + DEPTH, m.columns), depth = packed_columns(stop - c);
            decode_rows(m, row, end, c, stop, weights.data());
            for (int64_t v = 0; v < count; v += size) {
                const TileFunction multiply = TILES[std::min(size, count - v) - 1];
                for (int64_t r = row; r < end; r += ROWS)
                    multiply(weights.data() + (r - row) * depth, panel + c * count + v * depth, depth, c == 0,
                             out + v * out_stride + r - first, out_stride);
            }
        }
    }
    if (m.kind != INT8) return;
    const float* scales = static_cast<const float*>(m.absmax);
    for (int64_t v = 0; v < count; ++v)
        for (int64_t r = first; r < last; ++r) out[v * out_stride + r - first] *= scales[r] * INVERSE_127;
}

}  // namespace lmx

#else

namespace lmx {
bool has_panels() { return false; }
void pack(const bf16*, int64_t, int64_t, int64_t, int64_t, int64_t, bf16*) {}
void multiply_panel(const Matrix&, const bf16*, int64_t, int64_t, int64_t, float*, int64_t) {}
}  // namespace lmx

#endif
