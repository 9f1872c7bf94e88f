// Matrices of four-bit blocks times a few vectors with AVX-512 and its BF16 instructions.
#include <cmath>

#include "digits.h"
#include "vector_avx512_scales.h"

#if defined(LMX_X86)

namespace lmx {
namespace {

constexpr int64_t BYTES = UNIT / 2;  // a unit in four bits
// Where each lies in a page of its own and what is asked for has room in the first cache, eight are quicker than four and
// than sixteen.
constexpr int MANY = 8;
// How far ahead of themselves rows in float are asked for.
constexpr int64_t AHEAD = 24576;

// Pairs of bf16, 128 elements at a time: 64 bytes are 32 words of four codes each. The 16 values stand twice in a register
// of 32 lanes, and `vpermw` looks at the lowest five bits of a word: a shift brings each code there, and what lies above
// needs no mask.
struct Bf16Pairs {
    static constexpr bool IN_DIGITS = false;
    static constexpr int64_t BYTES_OF_ELEMENT = 2;
    using Table = __m512i;
    using Sum = __m512;
    static float factor(const Matrix& m) { return code_scale(m); }
    LMX_INLINE LMX_AVX512 static Table table(const Matrix& m) { return table_of(rounded_code(m)); }
    LMX_INLINE LMX_AVX512 static void decode(__m512i words, Table table, __m512i (&values)[4]) {
        values[0] = _mm512_permutexvar_epi16(words, table);
        values[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table);
        values[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), table);
        values[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), table);
    }
    LMX_INLINE LMX_AVX512 static Sum begin(const uint8_t*) { return _mm512_setzero_ps(); }
    LMX_INLINE LMX_AVX512 static Sum add(int, Sum sum, __m512i values, __m512i x) {
        return _mm512_dpbf16_ps(sum, (__m512bh)values, (__m512bh)x);
    }
    LMX_INLINE LMX_AVX512 static __m512 floats(Sum sum) { return sum; }
};

// Bytes (digits.h), looked up by `vpermb`, which looks at the lowest six bits and is half the work of `vpermw` on these CPUs.
struct DigitPairs {
    static constexpr bool IN_DIGITS = true;
    static constexpr int64_t BYTES_OF_ELEMENT = 4;
    struct Table {
        __m512i coarse, fine;
    };
    using Sum = __m512i;
    static float factor(const Matrix& m) { return digit_scale(m); }
    LMX_INLINE LMX_AVX512 static Table table(const Matrix& m) {
        const auto* digits = reinterpret_cast<const __m128i*>(code_digits(m));
        return {_mm512_broadcast_i32x4(_mm_loadu_si128(digits)), _mm512_broadcast_i32x4(_mm_loadu_si128(digits + 1))};
    }
    LMX_INLINE LMX_AVX512 static void decode(__m512i low, const Table& table, __m512i (&values)[4]) {
        const __m512i high = _mm512_srli_epi16(low, 4);
        values[0] = _mm512_permutexvar_epi8(low, table.coarse);
        values[1] = _mm512_permutexvar_epi8(high, table.coarse);
        values[2] = _mm512_permutexvar_epi8(low, table.fine);
        values[3] = _mm512_permutexvar_epi8(high, table.fine);
    }
    LMX_INLINE LMX_AVX512 static Sum begin(const uint8_t* pair) {
        return _mm512_load_si512(reinterpret_cast<const DigitPair*>(pair)->start);
    }
    LMX_INLINE LMX_AVX512 static Sum add(int i, Sum sum, __m512i values, __m512i x) {
        sum = _mm512_dpbusd_epi32(sum, values, x);
        return i == 1 ? _mm512_slli_epi32(sum, DIGIT_SHIFT) : sum;
    }
    LMX_INLINE LMX_AVX512 static __m512 floats(Sum sum) { return _mm512_cvtepi32_ps(sum); }
};

// Four bits times two units of each vector at a time. The first half of the lanes belongs to one unit, the second to the
// next: sums in float, then times their blocks' scales.
//
// Rows side by side, `step` from each to the next, share the loads of x, which are most of all loads and else the bottleneck.
// Where loops are not unrolled before all else, sums are written to memory too.
template <class Pairs, int ROWS, int VECTORS, bool NEAR, class Scales>
LMX_AVX512 LMX_INLINE void four_bit_rows(const Matrix& m, const Vectors& x, int64_t row, int64_t step, Soon soon, float* out,
                                         int64_t out_stride, const typename Pairs::Table& table, float factor,
                                         Scales& scales) {
    constexpr int TOGETHER = std::min(ROWS, 4);  // more would not leave registers enough
    const int64_t units = m.columns / UNIT, width = units * BYTES;
    const uint8_t* bytes = m.data + row * width;
    scales.begin(step, soon.scales);
    const auto* vectors = static_cast<const uint8_t*>(x.data);
    typename Scales::Sums sums[ROWS][VECTORS];
    LMX_UNROLLED for (auto& of_row : sums)
        LMX_UNROLLED for (auto& sum : of_row) sum.clear();
    for (int64_t unit = 0; unit < units; unit += 2, soon.data += soon.turn, scales.next()) {
        if ((unit & (scales.run() - 1)) == 0) scales.enter(row, unit);
        LMX_UNROLLED for (int first = 0; first < ROWS; first += TOGETHER) {
            __m512i values[TOGETHER][4];
            LMX_UNROLLED for (int r = 0; r < TOGETHER; ++r) {
                prefetch<NEAR>(soon.data + (first + r) * soon.row);
                Pairs::decode(load_in_order(bytes + (first + r) * step * width + unit * BYTES), table, values[r]);
            }
            LMX_UNROLLED for (int v = 0; v < VECTORS; ++v) {
                const uint8_t* pair = vectors + (v * x.stride + unit * UNIT) * Pairs::BYTES_OF_ELEMENT;
                typename Pairs::Sum of_pair[TOGETHER];
                LMX_UNROLLED for (auto& sum : of_pair) sum = Pairs::begin(pair);
                LMX_UNROLLED for (int i = 0; i < 4; ++i) {
                    const __m512i vector = _mm512_load_si512(pair + 64 * i);
                    LMX_UNROLLED for (int r = 0; r < TOGETHER; ++r)
                        of_pair[r] = Pairs::add(i, of_pair[r], values[r][i], vector);
                }
                LMX_UNROLLED for (int r = 0; r < TOGETHER; ++r)
                    scales.add(first + r, v, Pairs::floats(of_pair[r]), sums[first + r][v]);
            }
        }
    }
    LMX_UNROLLED for (int v = 0; v < VECTORS; ++v)
        LMX_UNROLLED for (int first = 0; first < ROWS; first += TOGETHER) {
            alignas(16) float answers[4];
            __m512 of[TOGETHER];
            LMX_UNROLLED for (int r = 0; r < TOGETHER; ++r) of[r] = sums[first + r][v].sum();
            const __m128 four =
                sums_of_four(of[0], of[TOGETHER > 1], of[TOGETHER > 2 ? 2 : TOGETHER - 1], of[TOGETHER - 1]);
            _mm_store_ps(answers, _mm_mul_ps(four, _mm_set1_ps(factor)));
            for (int r = 0; r < TOGETHER; ++r) out[v * out_stride + (first + r) * step] = answers[r];
        }
}

// A row times one vector in digits, element by element.
float row_exactly(const Matrix& m, const Vectors& x, int64_t row, int64_t v) {
    const auto* pairs = static_cast<const DigitPair*>(x.data) + v * x.stride / (2 * UNIT);
    const int shift = log2_of(m.block_size);
    float sum = 0;
    for (int64_t c = 0; c < m.columns; ++c) {
        const int64_t at = row * m.columns + c, place = c % (2 * UNIT);
        const uint8_t byte = m.data[at / 2];
        const float weight = m.code[at & 1 ? byte & 15 : byte >> 4] * block_scale(m, at >> shift);
        const DigitPair& pair = pairs[c / (2 * UNIT)];
        sum = add_exactly(sum, weight, pair.value(place), pair.scales[place / UNIT]);
    }
    return sum;
}

void collect(const Vectors&, NoUnitScales&) {}
template <int VECTORS>
void collect(const Vectors& x, UnitScales<VECTORS>& out) {
    const int64_t pairs = x.columns / (2 * UNIT);
    for (int v = 0; v < VECTORS; ++v) {
        const auto* of_vector = static_cast<const DigitPair*>(x.data) + v * x.stride / (2 * UNIT);
        for (int64_t i = 0; i < pairs; ++i) std::memcpy(out.of[v] + 2 * i, of_vector[i].scales, sizeof of_vector[i].scales);
        std::fill_n(out.of[v] + 2 * pairs, 16, 0.0f);
    }
}

template <class Pairs, int SIDE, int VECTORS, bool NEAR, class Scales, class LastScales>
LMX_AVX512 void four_bit_all(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out,
                             int64_t out_stride) {
    const auto table = Pairs::table(m);
    const float factor = Pairs::factor(m);
    std::conditional_t<Pairs::IN_DIGITS, UnitScales<VECTORS>, NoUnitScales> of_x;
    collect(x, of_x);
    Scales scales(m, of_x);
    LastScales last_scales(m, of_x);
    const auto rows = [&](auto side, int64_t row, auto step, Soon soon) LMX_AVX512 {
        float* at = out + row - first;
        if constexpr (side() > 1)
            four_bit_rows<Pairs, SIDE, VECTORS, NEAR>(m, x, row, step, soon, at, out_stride, table, factor, scales);
        else
            four_bit_rows<Pairs, 1, VECTORS, NEAR>(m, x, row, step, soon, at, out_stride, table, factor, last_scales);
    };
    // CPUs that multiply in digits are those that read pages side by side.
    if (Scales::serves(m)) for_rows<SIDE, Pairs::IN_DIGITS>(m, x, first, last, rows);
    else for_rows<1, Pairs::IN_DIGITS>(m, x, first, last, rows);
    if constexpr (Pairs::IN_DIGITS) compute_again(m, x, first, last, out, out_stride, row_exactly);
}

template <int VECTORS, bool NEAR>
struct OfBf16 {
    template <int SIDE, template <int> class Scales>
    static constexpr RowsFunction with = four_bit_all<Bf16Pairs, SIDE, VECTORS, NEAR, Scales<SIDE>, Scales<1>>;
    template <int ROWS>
    using Nested = NestedScales<ROWS, NEAR>;
    template <int ROWS>
    using Float = FloatScales<ROWS, NEAR>;
    template <int ROWS>
    using Narrow = RunScales<ROWS, NEAR, StoredScales<ROWS, bf16, false>, NoUnitScales>;
    template <int ROWS>
    using NarrowWide = RunScales<ROWS, NEAR, StoredScales<ROWS, bf16, true>, NoUnitScales>;

    template <int SIDE>
    static RowsFunction beside(const Matrix& m) {
        if (m.nested_map) return with<SIDE, Nested>;
        if (m.absmax_dtype != BF16) return with<SIDE, Float>;
        return m.block_size == UNIT ? with<SIDE, Narrow> : with<SIDE, NarrowWide>;
    }
    static int64_t side(const Matrix& m, const Vectors& x) { return VECTORS == 1 ? side_for(m, x) : 2; }
    static RowsFunction rows(const Matrix& m, int64_t side) {
        if constexpr (VECTORS == 1)
            if (side == 4) return beside<4>(m);
        return beside<2>(m);
    }
};

template <int VECTORS, bool NEAR>
struct OfDigits {
    template <int ROWS, class Source>
    using Scales = RunScales<ROWS, NEAR, Source, UnitScales<VECTORS>>;
    template <int SIDE, template <int> class Source>
    static constexpr RowsFunction with =
        four_bit_all<DigitPairs, SIDE, VECTORS, NEAR, Scales<SIDE, Source<SIDE>>, Scales<1, Source<1>>>;
    template <int ROWS>
    using Float = StoredScales<ROWS, float, false>;
    template <int ROWS>
    using FloatWide = StoredScales<ROWS, float, true>;
    template <int ROWS>
    using Narrow = StoredScales<ROWS, bf16, false>;
    template <int ROWS>
    using NarrowWide = StoredScales<ROWS, bf16, true>;

    static constexpr int SIDE = VECTORS == 1 ? 4 : 2;
    static int64_t side(const Matrix&, const Vectors&) { return SIDE; }
    static RowsFunction rows(const Matrix& m, int64_t) {
        constexpr int STORED_SIDE = VECTORS == 1 && NEAR ? MANY : SIDE;
        if (m.nested_map) return with<SIDE, NestedTables>;
        if (m.absmax_dtype != BF16) return m.block_size == UNIT ? with<STORED_SIDE, Float> : with<SIDE, FloatWide>;
        return m.block_size == UNIT ? with<STORED_SIDE, Narrow> : with<SIDE, NarrowWide>;
    }
};

template <template <int, bool> class Of, int VECTORS>
void four_bit_of(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t out_stride) {
    const int64_t side = Of<VECTORS, false>::side(m, x);
    RowsFunction all = Of<VECTORS, false>::rows(m, side);
    if constexpr (VECTORS == 1)
        if (is_near(m, x, side)) all = Of<1, true>::rows(m, side);
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

LMX_BY_COUNT(avx512_four_bit_bf16, (four_bit_of<OfBf16, 1>), (four_bit_of<OfBf16, 2>), (four_bit_of<OfBf16, 3>),
             (four_bit_of<OfBf16, 4>))
LMX_BY_COUNT(avx512_four_bit_digits, (four_bit_of<OfDigits, 1>), (four_bit_of<OfDigits, 2>), (four_bit_of<OfDigits, 3>),
             (four_bit_of<OfDigits, 4>))
LMX_BY_COUNT(avx512_four_bit_f32, four_bit_f32_of<1>, four_bit_f32_of<2>, four_bit_f32_of<3>, four_bit_f32_of<4>)

}  // namespace lmx

#endif
