// Matrices of four-bit blocks times a few vectors with AVX-512 and its BF16 instructions.
#include "vector_avx512_scales.h"

#if defined(LMX_X86)

namespace lmx {
namespace {

constexpr int64_t BYTES = UNIT / 2;  // a unit in four bits
// Rows that are read side by side.
template <int VECTORS>
constexpr int side_of = VECTORS == 1 ? 4 : 2;
// How far ahead of themselves rows in float are asked for.
constexpr int64_t AHEAD = 24576;

// Four bits times bf16, 128 elements at a time: 64 bytes are 32 words of four codes each. The 16 values stand twice in a
// register of 32 lanes, and `vpermw` looks at the lowest five bits of a word: a shift brings each code there, and what
// lies above needs no mask. The first half of the lanes belongs to one unit, the second to the next: sums in float, then
// times their blocks' scales.
//
// Rows side by side share the loads of x, which are most of all loads and else the bottleneck.
template <int ROWS, int VECTORS, bool NEAR, class Scales>
LMX_AVX512 LMX_INLINE void four_bit_rows(const Matrix& m, const Vectors& x, int64_t row, Ahead ahead, float* out,
                                         int64_t out_stride, __m512i table, Scales& scales) {
    const int64_t units = m.columns / UNIT, width = units * BYTES;
    const uint8_t* bytes = m.data + row * width;
    const uint8_t* soon = ahead.data;
    scales.ask_for(ahead.scales);
    const bf16* vectors = static_cast<const bf16*>(x.data);
    typename Scales::Sums sums[ROWS][VECTORS];
    for (auto& of_row : sums)
        for (auto& sum : of_row) sum.clear();
    for (int64_t unit = 0; unit < units; unit += 2, scales.next()) {
        if ((unit & (scales.run() - 1)) == 0) scales.enter(row, unit);
        __m512bh values[ROWS][4];
        for (int r = 0; r < ROWS; ++r) {
            const uint8_t* at = bytes + r * width + unit * BYTES;
            prefetch<NEAR>(soon + r * 2 * BYTES);
            const __m512i words = load_in_order(at);
            values[r][0] = (__m512bh)_mm512_permutexvar_epi16(words, table);
            values[r][1] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table);
            values[r][2] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), table);
            values[r][3] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), table);
        }
        soon += ROWS * 2 * BYTES;
        __m512 parts[ROWS][VECTORS];
        for (int v = 0; v < VECTORS; ++v)
            for (int i = 0; i < 4; ++i) {
                const __m512bh vector = (__m512bh)_mm512_load_si512(vectors + v * x.stride + unit * UNIT + 32 * i);
                for (int r = 0; r < ROWS; ++r) {
                    const __m512 before = i ? parts[r][v] : _mm512_setzero_ps();
                    parts[r][v] = _mm512_dpbf16_ps(before, values[r][i], vector);
                }
            }
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECTORS; ++v) scales.add(r, parts[r][v], sums[r][v]);
    }
    const __m128 factor = _mm_set1_ps(code_scale(m));
    for (int v = 0; v < VECTORS; ++v) {
        alignas(16) float answers[4];
        __m512 of[ROWS];
        for (int r = 0; r < ROWS; ++r) of[r] = sums[r][v].sum();
        const __m128 four = sums_of_four(of[0], of[ROWS > 1], of[ROWS > 2 ? 2 : ROWS - 1], of[ROWS - 1]);
        _mm_store_ps(answers, _mm_mul_ps(four, factor));
        std::memcpy(out + v * out_stride, answers, ROWS * sizeof(float));
    }
}

template <int SIDE, int VECTORS, bool NEAR, class Scales, class LastScales>
LMX_AVX512 void four_bit_all(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out,
                             int64_t out_stride) {
    const __m512i table = table_of(rounded_code(m));
    Scales scales(m);
    LastScales last_scales(m);
    // What memory is asked for goes from front to back, though rows lie side by side: two streams are slower.
    const Soon soon(m, x, last, SIDE);
    int64_t row = first;
    for (; row + SIDE <= last && Scales::serves(m); row += SIDE, out += SIDE)
        four_bit_rows<SIDE, VECTORS, NEAR>(m, x, row, soon.at(row), out, out_stride, table, scales);
    for (; row < last; ++row, ++out)
        four_bit_rows<1, VECTORS, NEAR>(m, x, row, soon.at(row), out, out_stride, table, last_scales);
}

template <int VECTORS, bool NEAR>
RowsFunction four_bit_for(const Matrix& m) {
    constexpr int SIDE = side_of<VECTORS>;
    if (m.nested_map) return four_bit_all<SIDE, VECTORS, NEAR, NestedScales<SIDE, NEAR>, NestedScales<1, NEAR>>;
    if (m.absmax_dtype == BF16 && m.block_size == UNIT)
        return four_bit_all<SIDE, VECTORS, NEAR, NarrowScales<SIDE, NEAR, false>, NarrowScales<1, NEAR, false>>;
    if (m.absmax_dtype == BF16)
        return four_bit_all<SIDE, VECTORS, NEAR, NarrowScales<SIDE, NEAR, true>, NarrowScales<1, NEAR, true>>;
    return four_bit_all<SIDE, VECTORS, NEAR, FloatScales<SIDE, NEAR>, FloatScales<1, NEAR>>;
}

template <int VECTORS>
void four_bit_of(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t out_stride) {
    RowsFunction all = four_bit_for<VECTORS, false>(m);
    if constexpr (VECTORS == 1)
        if (Soon::is_near(m, x, side_of<1>)) all = four_bit_for<1, true>(m);
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

LMX_BY_COUNT(avx512_four_bit_bf16, four_bit_of<1>, four_bit_of<2>, four_bit_of<3>, four_bit_of<4>)
LMX_BY_COUNT(avx512_four_bit_f32, four_bit_f32_of<1>, four_bit_f32_of<2>, four_bit_f32_of<3>, four_bit_f32_of<4>)

}  // namespace lmx

#endif
