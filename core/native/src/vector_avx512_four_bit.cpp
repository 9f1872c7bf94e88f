// Matrices of four-bit blocks times a few vectors with AVX-512 and its BF16 instructions.
#include <cmath>

#include "vector_avx512_scales.h"
#include "whole.h"

#if defined(LMX_X86)

namespace lmx {
namespace {

constexpr int64_t BYTES = UNIT / 2;  // a unit in four bits
// Rows that are read side by side.
template <int VECTORS>
constexpr int side_of = VECTORS == 1 ? 4 : 2;
// Where each lies in a page of its own and what is asked for has room in the first cache, eight are quicker than four and
// than sixteen, but for scales that take as much work as the codes.
constexpr int MANY = 8;
// How far ahead of themselves rows in float are asked for.
constexpr int64_t AHEAD = 24576;

// What the values of the 16 codes are multiplied in, and by which factor the sums are then too large.
struct Bf16Pairs {
    static constexpr Layout LAYOUT = QUARTERED_BF16;
    static constexpr bool SCALED = false;
    static constexpr int64_t BYTES_OF_ELEMENT = 2;
    using Sum = __m512;
    static float factor(const Matrix& m) { return code_scale(m); }
    LMX_INLINE LMX_AVX512 static __m512i table(const Matrix& m) { return table_of(rounded_code(m)); }
    LMX_INLINE LMX_AVX512 static Sum zero() { return _mm512_setzero_ps(); }
    LMX_INLINE LMX_AVX512 static Sum add(Sum sum, __m512i values, __m512i x) {
        return _mm512_dpbf16_ps(sum, (__m512bh)values, (__m512bh)x);
    }
    LMX_INLINE LMX_AVX512 static __m512 floats(Sum sum) { return sum; }
};

// 14 bits of a value times 16 of an element, and eight of them in each 32 bits of a sum.
struct WholePairs {
    static constexpr Layout LAYOUT = QUARTERED_WHOLE;
    static constexpr bool SCALED = true;
    static constexpr int64_t BYTES_OF_ELEMENT = 4;
    static constexpr float MOST = 8191;
    static_assert(MOST * WholePair::MOST * 8 < 2147483648.0, "a sum overflows");
    using Sum = __m512i;
    static float largest(const Matrix& m) {
        float most = 0;
        for (int i = 0; i < 16; ++i) most = std::max(most, std::fabs(m.code[i]));
        return most;
    }
    static float factor(const Matrix& m) { return largest(m) / MOST; }
    LMX_INLINE LMX_AVX512 static __m512i table(const Matrix& m) {
        const float most = largest(m);
        const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(m.code), _mm512_set1_ps(most > 0 ? MOST / most : 0));
        return _mm512_broadcast_i64x4(_mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(scaled)));
    }
    LMX_INLINE LMX_AVX512 static Sum zero() { return _mm512_setzero_si512(); }
    LMX_INLINE LMX_AVX512 static Sum add(Sum sum, __m512i values, __m512i x) {
        return _mm512_dpwssd_epi32(sum, values, x);
    }
    LMX_INLINE LMX_AVX512 static __m512 floats(Sum sum) { return _mm512_cvtepi32_ps(sum); }
    // Of the elements of x in a pair of units.
    LMX_INLINE static float scale(const uint8_t* pair) { return reinterpret_cast<const WholePair*>(pair)->scale; }
};

// Four bits times pairs of 16 bits, 128 elements at a time: 64 bytes are 32 words of four codes each. The 16 values stand
// twice in a register of 32 lanes, and `vpermw` looks at the lowest five bits of a word: a shift brings each code there,
// and what lies above needs no mask. The first half of the lanes belongs to one unit, the second to the next: sums in
// float, then times their blocks' scales.
//
// Rows side by side, `step` from each to the next, share the loads of x, which are most of all loads and else the bottleneck.
template <class Pairs, int ROWS, int VECTORS, bool NEAR, class Scales>
LMX_AVX512 LMX_INLINE void four_bit_rows(const Matrix& m, const Vectors& x, int64_t row, int64_t step, Soon soon,
                                         float* out, int64_t out_stride, __m512i table, float factor, Scales& scales) {
    constexpr int TOGETHER = std::min(ROWS, 4);  // more would not leave registers enough
    const int64_t units = m.columns / UNIT, width = units * BYTES;
    const uint8_t* bytes = m.data + row * width;
    scales.begin(step, soon.scales);
    const auto* vectors = static_cast<const uint8_t*>(x.data);
    typename Scales::Sums sums[ROWS][VECTORS];
    for (auto& of_row : sums)
        for (auto& sum : of_row) sum.clear();
    for (int64_t unit = 0; unit < units; unit += 2, soon.data += soon.turn, scales.next()) {
        if ((unit & (scales.run() - 1)) == 0) scales.enter(row, unit);
        for (int first = 0; first < ROWS; first += TOGETHER) {
            __m512i values[TOGETHER][4];
            for (int r = 0; r < TOGETHER; ++r) {
                const uint8_t* at = bytes + (first + r) * step * width + unit * BYTES;
                prefetch<NEAR>(soon.data + (first + r) * soon.row);
                const __m512i words = load_in_order(at);
                values[r][0] = _mm512_permutexvar_epi16(words, table);
                values[r][1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table);
                values[r][2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), table);
                values[r][3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), table);
            }
            __m512 parts[TOGETHER][VECTORS];
            for (int v = 0; v < VECTORS; ++v) {
                const uint8_t* pair = vectors + (v * x.stride + unit * UNIT) * Pairs::BYTES_OF_ELEMENT;
                typename Pairs::Sum of_pair[TOGETHER];
                for (int i = 0; i < 4; ++i) {
                    const __m512i vector = _mm512_load_si512(pair + 64 * i);
                    for (int r = 0; r < TOGETHER; ++r)
                        of_pair[r] = Pairs::add(i ? of_pair[r] : Pairs::zero(), values[r][i], vector);
                }
                for (int r = 0; r < TOGETHER; ++r) {
                    parts[r][v] = Pairs::floats(of_pair[r]);
                    if constexpr (Pairs::SCALED && !Scales::OF_X)
                        parts[r][v] = _mm512_mul_ps(parts[r][v], _mm512_set1_ps(Pairs::scale(pair)));
                }
            }
            for (int r = 0; r < TOGETHER; ++r)
                for (int v = 0; v < VECTORS; ++v) scales.add(first + r, parts[r][v], sums[first + r][v]);
        }
    }
    for (int v = 0; v < VECTORS; ++v)
        for (int first = 0; first < ROWS; first += TOGETHER) {
            alignas(16) float answers[4];
            __m512 of[TOGETHER];
            for (int r = 0; r < TOGETHER; ++r) of[r] = sums[first + r][v].sum();
            const __m128 four =
                sums_of_four(of[0], of[TOGETHER > 1], of[TOGETHER > 2 ? 2 : TOGETHER - 1], of[TOGETHER - 1]);
            _mm_store_ps(answers, _mm_mul_ps(four, _mm_set1_ps(factor)));
            for (int r = 0; r < TOGETHER; ++r) out[v * out_stride + (first + r) * step] = answers[r];
        }
}

// A row times one vector of whole numbers, element by element.
float row_exactly(const Matrix& m, const Vectors& x, int64_t row, int64_t v) {
    const auto* pairs = static_cast<const WholePair*>(x.data) + v * x.stride / (2 * UNIT);
    const int shift = log2_of(m.block_size);
    float sum = 0;
    for (int64_t c = 0; c < m.columns; ++c) {
        const int64_t at = row * m.columns + c, place = c % (2 * UNIT);
        const uint8_t byte = m.data[at / 2];
        const float weight = m.code[at & 1 ? byte & 15 : byte >> 4] * block_scale(m, at >> shift);
        sum = add_exactly(sum, weight, pairs[c / (2 * UNIT)], (place % 4 ^ 1) * 32 + place / 4);
    }
    return sum;
}

template <class Pairs, int SIDE, int VECTORS, bool NEAR, class Scales, class LastScales>
LMX_AVX512 void four_bit_all(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out,
                             int64_t out_stride) {
    const __m512i table = Pairs::table(m);
    const float factor = Pairs::factor(m);
    float of_x[Scales::OF_X ? MOST_WHOLE_COLUMNS / UNIT : 1];
    if constexpr (Scales::OF_X)
        for (int64_t unit = 0; unit < m.columns / UNIT; ++unit)
            of_x[unit] = static_cast<const WholePair*>(x.data)[unit / 2].scale;
    Scales scales(m, of_x);
    LastScales last_scales(m, of_x);
    const auto rows = [&](auto side, int64_t row, int64_t step, Soon soon) LMX_AVX512 {
        float* at = out + row - first;
        if constexpr (side() > 1)
            four_bit_rows<Pairs, SIDE, VECTORS, NEAR>(m, x, row, step, soon, at, out_stride, table, factor, scales);
        else
            four_bit_rows<Pairs, 1, VECTORS, NEAR>(m, x, row, step, soon, at, out_stride, table, factor, last_scales);
    };
    if (Scales::serves(m)) for_rows<SIDE>(m, x, first, last, rows);
    else for_rows<1>(m, x, first, last, rows);
    if constexpr (Pairs::SCALED) compute_again(m, x, first, last, out, out_stride, row_exactly);
}

template <class Pairs, int VECTORS, bool NEAR>
RowsFunction four_bit_for(const Matrix& m) {
    constexpr int SIDE = side_of<VECTORS>;
    if (m.nested_map) return four_bit_all<Pairs, SIDE, VECTORS, NEAR, NestedScales<SIDE, NEAR>, NestedScales<1, NEAR>>;
    if (m.absmax_dtype != BF16)
        return four_bit_all<Pairs, SIDE, VECTORS, NEAR, FloatScales<SIDE, NEAR>, FloatScales<1, NEAR>>;
    constexpr bool OF_X = Pairs::SCALED && VECTORS == 1;
    if (m.block_size != UNIT)
        return four_bit_all<Pairs, SIDE, VECTORS, NEAR, NarrowScales<SIDE, NEAR, true, OF_X>, NarrowScales<1, NEAR, true, OF_X>>;
    // CPUs that multiply by whole numbers are those whose rows lie in pages of their own (Order).
    constexpr int NARROW_SIDE = OF_X && NEAR ? MANY : SIDE;
    return four_bit_all<Pairs, NARROW_SIDE, VECTORS, NEAR, NarrowScales<NARROW_SIDE, NEAR, false, OF_X>,
                        NarrowScales<1, NEAR, false, OF_X>>;
}

template <class Pairs, int VECTORS>
void four_bit_of(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t out_stride) {
    RowsFunction all = four_bit_for<Pairs, VECTORS, false>(m);
    if constexpr (VECTORS == 1)
        if (Order::is_near(m, x, side_of<1>)) all = four_bit_for<Pairs, 1, true>(m);
    all(m, x, first, last, out, out_stride);
}

// Scales of a matrix, plain or decoded on the way.
template <bool PLAIN>
struct Scales {
    const Matrix& m;
    inline float operator[](int64_t block) const {
        if constexpr (PLAIN) return static_cast<const float*>(m.absmax)[block];
        return block_scale(m, block);
    }
};

// Four bits times float, in float all through.
template <int VECTORS, bool PLAIN>
LMX_AVX512 void four_bit_row_f32(const Matrix& m, const Vectors& x, int64_t row, float* out, int64_t out_stride,
                                 __m512 table) {
    const int64_t units = m.columns / UNIT, first = row * units;
    const int shift = log2_of(m.block_size / UNIT);
    const float* vectors = static_cast<const float*>(x.data);
    const Scales<PLAIN> scales{m};
    const uint8_t* bytes = m.data + first * BYTES;
    __m512 sums[VECTORS];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    for (int64_t unit = 0; unit < units; ++unit, bytes += BYTES) {
        prefetch<false>(bytes + AHEAD);
        __m512 parts[VECTORS][2];
        for (int half = 0; half < 2; ++half) {
            const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + 16 * half));
            const __m512i pairs = _mm512_cvtepu8_epi32(packed);
            const __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), table);
            const __m512 odd = _mm512_permutexvar_ps(pairs, table);
            for (int v = 0; v < VECTORS; ++v) {
                const float* vector = vectors + v * x.stride + unit * UNIT + 16 * half;
                parts[v][half] = _mm512_mul_ps(even, _mm512_loadu_ps(vector));
                parts[v][half] = _mm512_fmadd_ps(odd, _mm512_loadu_ps(vector + UNIT / 2), parts[v][half]);
            }
        }
        const __m512 scale = _mm512_set1_ps(scales[(first + unit) >> shift]);
        for (int v = 0; v < VECTORS; ++v)
            sums[v] = _mm512_fmadd_ps(_mm512_add_ps(parts[v][0], parts[v][1]), scale, sums[v]);
    }
    for (int v = 0; v < VECTORS; ++v) out[v * out_stride] = _mm512_reduce_add_ps(sums[v]);
}

template <int VECTORS>
LMX_AVX512 void four_bit_f32_of(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out,
                                int64_t out_stride) {
    const __m512 table = _mm512_loadu_ps(m.code);
    const bool plain = !m.nested_map && m.absmax_dtype == F32;
    const auto of_row = plain ? four_bit_row_f32<VECTORS, true> : four_bit_row_f32<VECTORS, false>;
    for (int64_t row = first; row < last; ++row) of_row(m, x, row, out + row - first, out_stride, table);
}

}  // namespace

LMX_BY_COUNT(avx512_four_bit_bf16, (four_bit_of<Bf16Pairs, 1>), (four_bit_of<Bf16Pairs, 2>),
             (four_bit_of<Bf16Pairs, 3>), (four_bit_of<Bf16Pairs, 4>))
LMX_BY_COUNT(avx512_four_bit_whole, (four_bit_of<WholePairs, 1>), (four_bit_of<WholePairs, 2>),
             (four_bit_of<WholePairs, 3>), (four_bit_of<WholePairs, 4>))
LMX_BY_COUNT(avx512_four_bit_f32, four_bit_f32_of<1>, four_bit_f32_of<2>, four_bit_f32_of<3>, four_bit_f32_of<4>)

}  // namespace lmx

#endif
