// Matrices of int8, and of floats that were kept, times a few vectors with AVX-512 and its BF16 instructions.
#include "vector_avx512.h"

#if defined(LMX_X86)

namespace lmx {
namespace {

// 16 stored elements as floats.
template <Kind KIND>
LMX_AVX512 LMX_INLINE __m512 load16(const uint8_t* at) {
    if constexpr (KIND == INT8)
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
    if constexpr (KIND == KEPT_F32) return _mm512_loadu_ps(at);
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    if constexpr (KIND == KEPT_F16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

constexpr int64_t size_of(Kind kind) { return kind == INT8 ? 1 : kind == KEPT_F32 ? 4 : 2; }

// int8 and what was kept in 16 or 32 bits, times float.
template <Kind KIND, int VECTORS>
LMX_AVX512 void plain_row(const Matrix& m, const Vectors& x, int64_t row, float* out, int64_t out_stride) {
    constexpr int64_t size = size_of(KIND);
    const float* vectors = static_cast<const float*>(x.data);
    const uint8_t* weights = m.data + row * m.columns * size;
    __m512 sums[VECTORS][4];
    for (auto& of_vector : sums)
        for (auto& sum : of_vector) sum = _mm512_setzero_ps();
    int64_t c = 0;
    for (; c + UNIT <= m.columns; c += UNIT) {
        for (int part = 0; part < 4; ++part) {
            const __m512 values = load16<KIND>(weights + (c + 16 * part) * size);
            for (int v = 0; v < VECTORS; ++v) {
                const __m512 vector = _mm512_loadu_ps(vectors + v * x.stride + c + 16 * part);
                sums[v][part] = _mm512_fmadd_ps(values, vector, sums[v][part]);
            }
        }
    }
    for (; c < m.columns; c += 16) {
        uint8_t last[64] = {};  // a copy, so that nothing is read behind the matrix
        std::memcpy(last, weights + c * size, static_cast<size_t>(std::min<int64_t>(m.columns - c, 16) * size));
        const __m512 values = load16<KIND>(last);
        for (int v = 0; v < VECTORS; ++v)
            sums[v][0] = _mm512_fmadd_ps(values, _mm512_loadu_ps(vectors + v * x.stride + c), sums[v][0]);
    }
    const float scale = KIND == INT8 ? static_cast<const float*>(m.absmax)[row] * INVERSE_127 : 1.0f;
    for (int v = 0; v < VECTORS; ++v) {
        const __m512 sum = _mm512_add_ps(_mm512_add_ps(sums[v][0], sums[v][1]), _mm512_add_ps(sums[v][2], sums[v][3]));
        out[v * out_stride] = scale * _mm512_reduce_add_ps(sum);
    }
}

// bf16 times bf16.
template <int ROWS, int VECTORS, bool NEAR>
LMX_AVX512 LMX_INLINE void bf16_rows(const Matrix& m, const Vectors& x, int64_t row, int64_t step, Soon soon, float* out,
                                     int64_t out_stride) {
    const bf16* vectors = static_cast<const bf16*>(x.data);
    const bf16* weights = reinterpret_cast<const bf16*>(m.data) + row * m.columns;
    const int64_t apart = step * m.columns;
    __m512 sums[ROWS][VECTORS][4];
    for (auto& of_row : sums)
        for (auto& of_vector : of_row)
            for (auto& sum : of_vector) sum = _mm512_setzero_ps();
    int64_t c = 0;
    for (; c + 128 <= m.columns; c += 128)
        for (int part = 0; part < 4; ++part, soon.data += soon.turn) {
            __m512bh some[VECTORS];
            for (int v = 0; v < VECTORS; ++v)
                some[v] = (__m512bh)_mm512_loadu_si512(vectors + v * x.stride + c + 32 * part);
            for (int r = 0; r < ROWS; ++r) {
                prefetch<NEAR>(soon.data + r * soon.row);
                const __m512bh values = (__m512bh)_mm512_loadu_si512(weights + r * apart + c + 32 * part);
                for (int v = 0; v < VECTORS; ++v) sums[r][v][part] = _mm512_dpbf16_ps(sums[r][v][part], values, some[v]);
            }
        }
    for (; c < m.columns; c += 32) {
        const int64_t left = m.columns - c;
        const __mmask32 mask = left >= 32 ? 0xffffffffu : (1u << left) - 1;
        for (int r = 0; r < ROWS; ++r) {
            const __m512bh values = (__m512bh)_mm512_maskz_loadu_epi16(mask, weights + r * apart + c);
            for (int v = 0; v < VECTORS; ++v) {
                const __m512bh vector = (__m512bh)_mm512_loadu_si512(vectors + v * x.stride + c);
                sums[r][v][0] = _mm512_dpbf16_ps(sums[r][v][0], values, vector);
            }
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) {
            const auto& of = sums[r][v];
            const __m512 sum = _mm512_add_ps(_mm512_add_ps(of[0], of[1]), _mm512_add_ps(of[2], of[3]));
            out[v * out_stride + r * step] = _mm512_reduce_add_ps(sum);
        }
}

// int8 times bf16, by its nibbles: a byte is 16 h + l, and both parts come out of tables, exact in bf16. Converting to
// float takes no longer, but reads four times the bytes of x, and they do not stay in the nearest cache. Rows side by side
// share the loads of x, and their sums wait for each other less.
template <int ROWS, int VECTORS, bool NEAR>
LMX_AVX512 LMX_INLINE void int8_rows(const Matrix& m, const Vectors& x, int64_t row, int64_t step, Soon soon, float* out,
                                     int64_t out_stride, __m512i low, __m512i high) {
    const bf16* vectors = static_cast<const bf16*>(x.data);
    const uint8_t* weights = m.data + row * m.columns;
    __m512 sums[ROWS][VECTORS][2];
    for (auto& of_row : sums)
        for (auto& sum : of_row) sum[0] = sum[1] = _mm512_setzero_ps();
    for (int64_t c = 0; c < m.columns; c += UNIT) {
        __m512bh values[ROWS][4];
        for (int r = 0; r < ROWS; ++r) {
            prefetch<NEAR>(soon.data + r * soon.row);
            const __m512i words = load_in_order(weights + r * step * m.columns + c);
            values[r][0] = (__m512bh)_mm512_permutexvar_epi16(words, low);
            values[r][1] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), high);
            values[r][2] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), low);
            values[r][3] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), high);
        }
        soon.data += soon.turn;
        for (int v = 0; v < VECTORS; ++v)
            for (int half = 0; half < 2; ++half) {  // the even elements, the odd ones
                const __m512bh vector = (__m512bh)_mm512_loadu_si512(vectors + v * x.stride + c + half * (UNIT / 2));
                for (int r = 0; r < ROWS; ++r)
                    for (int part = 0; part < 2; ++part)
                        sums[r][v][part] = _mm512_dpbf16_ps(sums[r][v][part], values[r][2 * half + part], vector);
            }
    }
    for (int r = 0; r < ROWS; ++r) {
        const float scale = static_cast<const float*>(m.absmax)[row + r * step] * INVERSE_127;
        for (int v = 0; v < VECTORS; ++v)
            out[v * out_stride + r * step] = scale * _mm512_reduce_add_ps(_mm512_add_ps(sums[r][v][0], sums[r][v][1]));
    }
}

// The same by whole elements, for what is infinite: times the two parts of one element it can be infinity less infinity.
float int8_row_whole(const Matrix& m, const Vectors& x, int64_t row, int64_t v) {
    const bf16* vector = static_cast<const bf16*>(x.data) + v * x.stride;
    const uint8_t* weights = m.data + row * m.columns;
    float sum = 0;
    for (int64_t c = 0; c < m.columns; ++c) {
        const int64_t at = c / UNIT * UNIT + c % 2 * (UNIT / 2) + c % UNIT / 2;
        sum += static_cast<float>(static_cast<int8_t>(weights[c])) * bf16_to_float(vector[at]);
    }
    return sum * static_cast<const float*>(m.absmax)[row] * (1.0f / 127.0f);
}

template <int SIDE, int VECTORS, bool NEAR>
LMX_AVX512 void int8_all(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out,
                         int64_t out_stride) {
    bf16 low[16], high[16];
    for (int i = 0; i < 16; ++i) {
        low[i] = float_to_bf16(static_cast<float>(i));
        high[i] = float_to_bf16(16.0f * static_cast<float>(i < 8 ? i : i - 16));
    }
    const __m512i lows = table_of(low), highs = table_of(high);
    for_rows<SIDE, false>(m, x, first, last, [&](auto side, int64_t row, auto step, Soon soon) LMX_AVX512 {
        int8_rows<side(), VECTORS, NEAR>(m, x, row, step, soon, out + row - first, out_stride, lows, highs);
    });
    compute_again(m, x, first, last, out, out_stride, int8_row_whole);
}

template <int VECTORS, bool NEAR>
RowsFunction int8_beside(int64_t side) {
    return side == 4 ? int8_all<4, VECTORS, NEAR> : int8_all<2, VECTORS, NEAR>;
}

template <int VECTORS>
void int8_of(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t out_stride) {
    if constexpr (VECTORS > 1) return int8_all<2, VECTORS, false>(m, x, first, last, out, out_stride);
    const int64_t side = side_for(m, x);
    const auto all = is_near(m, x, side) ? int8_beside<1, true>(side) : int8_beside<1, false>(side);
    all(m, x, first, last, out, out_stride);
}

template <int SIDE, int VECTORS, bool NEAR>
LMX_AVX512 void bf16_all(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t out_stride) {
    for_rows<SIDE, (SIDE > 1)>(m, x, first, last, [&](auto side, int64_t row, auto step, Soon soon) LMX_AVX512 {
        bf16_rows<side(), VECTORS, NEAR>(m, x, row, step, soon, out + row - first, out_stride);
    });
}

template <int VECTORS>
void bf16_of(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t out_stride) {
    constexpr int SIDE = VECTORS == 1 ? 4 : 1;
    if (SIDE > 1 && in_pages()) {
        const auto all = is_near(m, x, SIDE) ? bf16_all<SIDE, VECTORS, true> : bf16_all<SIDE, VECTORS, false>;
        return all(m, x, first, last, out, out_stride);
    }
    const auto all = is_near(m, x, 1) ? bf16_all<1, VECTORS, true> : bf16_all<1, VECTORS, false>;
    all(m, x, first, last, out, out_stride);
}

template <Kind KIND, int VECTORS>
void plain_of(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t out_stride) {
    for (int64_t row = first; row < last; ++row) plain_row<KIND, VECTORS>(m, x, row, out + row - first, out_stride);
}

LMX_BY_COUNT(int8_bf16, int8_of<1>, int8_of<2>, int8_of<3>, int8_of<4>)
LMX_BY_COUNT(kept_bf16, bf16_of<1>, bf16_of<2>, bf16_of<3>, bf16_of<4>)

template <Kind KIND>
LMX_BY_COUNT(plain, (plain_of<KIND, 1>), (plain_of<KIND, 2>), (plain_of<KIND, 3>), (plain_of<KIND, 4>))

}  // namespace

Kernel avx512_kernel(const Matrix& m, Dtype dtype) {
    const bool paired = level() == AMX && dtype == BF16 && m.columns % (2 * UNIT) == 0;
    switch (m.kind) {
        case FOUR_BIT:
            if (paired && m.columns <= MOST_DIGIT_COLUMNS) return {DIGITS, avx512_four_bit_digits};
            if (dtype == BF16 && m.columns % (2 * UNIT) == 0) return {QUARTERED_BF16, avx512_four_bit_bf16};
            return {SPLIT_F32, avx512_four_bit_f32};
        case INT8:
            if (paired) return {PLAIN_WHOLE, avx512_int8_whole};
            if (dtype == BF16 && m.columns % UNIT == 0) return {SPLIT_BF16, int8_bf16};
            return {PLAIN_F32, plain<INT8>};
        case KEPT_BF16: return dtype == BF16 ? Kernel{PLAIN_BF16, kept_bf16} : Kernel{PLAIN_F32, plain<KEPT_BF16>};
        case KEPT_F16: return {PLAIN_F32, plain<KEPT_F16>};
        default: return {PLAIN_F32, plain<KEPT_F32>};
    }
}

}  // namespace lmx

#endif
