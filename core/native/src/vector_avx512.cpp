// Matrices times a few vectors with AVX-512 and its BF16 instructions.
#include "vector.h"

#if defined(LMX_X86)

namespace lmx {
namespace {

constexpr int64_t BYTES = UNIT / 2;  // a unit in four bits
// How far ahead of itself a row is asked for: the hardware stops at the border of a page.
constexpr int64_t AHEAD = 1024;

inline LMX_AVX512 void prefetch(const uint8_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at + AHEAD), _MM_HINT_T0); }

// Scales of a matrix, plain or decoded on the way.
template <bool NESTED>
struct Scales {
    const Matrix& m;
    inline float operator[](int64_t block) const {
        if constexpr (NESTED) return block_scale(m, block);
        return static_cast<const float*>(m.absmax)[block];
    }
};

// Four bits times bf16. The 16 values stand twice in a register of 32 lanes: `vpermw` looks at five bits, so that the
// low nibble needs no mask. Sums of a block in float, then times its scale.
template <int ROWS, int VECTORS, bool NESTED>
LMX_AVX512 void four_bit_rows(const Matrix& m, const Vectors& x, int64_t row, float* out, int64_t out_stride,
                              __m512i table) {
    const int64_t units = m.columns / UNIT, first_unit = row * units;
    const int shift = log2_of(m.block_size / UNIT);
    const bf16* vectors = static_cast<const bf16*>(x.data);
    const Scales<NESTED> scales{m};
    __m512 sums[ROWS][VECTORS];
    for (auto& of_row : sums)
        for (auto& sum : of_row) sum = _mm512_setzero_ps();
    for (int64_t unit = 0; unit < units; ++unit) {
        for (int r = 0; r < ROWS; ++r) {
            const int64_t at = first_unit + r * units + unit;
            const uint8_t* bytes = m.data + at * BYTES;
            if (!(unit & 1)) prefetch(bytes);
            const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
            const __m512bh even = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(pairs, 4), table);
            const __m512bh odd = (__m512bh)_mm512_permutexvar_epi16(pairs, table);
            const __m512 scale = _mm512_set1_ps(scales[at >> shift]);
            for (int v = 0; v < VECTORS; ++v) {
                const bf16* vector = vectors + v * x.stride + unit * UNIT;
                __m512 part = _mm512_dpbf16_ps(_mm512_setzero_ps(), even, (__m512bh)_mm512_loadu_si512(vector));
                part = _mm512_dpbf16_ps(part, odd, (__m512bh)_mm512_loadu_si512(vector + UNIT / 2));
                sums[r][v] = _mm512_fmadd_ps(part, scale, sums[r][v]);
            }
        }
    }
    for (int v = 0; v < VECTORS; ++v)
        for (int r = 0; r < ROWS; ++r) out[v * out_stride + r] = _mm512_reduce_add_ps(sums[r][v]);
}

// Four bits times float, in float all through.
template <int ROWS, int VECTORS, bool NESTED>
LMX_AVX512 void four_bit_rows_f32(const Matrix& m, const Vectors& x, int64_t row, float* out, int64_t out_stride,
                                  __m512 table) {
    const int64_t units = m.columns / UNIT, first_unit = row * units;
    const int shift = log2_of(m.block_size / UNIT);
    const float* vectors = static_cast<const float*>(x.data);
    const Scales<NESTED> scales{m};
    __m512 sums[ROWS][VECTORS];
    for (auto& of_row : sums)
        for (auto& sum : of_row) sum = _mm512_setzero_ps();
    for (int64_t unit = 0; unit < units; ++unit) {
        for (int r = 0; r < ROWS; ++r) {
            const int64_t at = first_unit + r * units + unit;
            const uint8_t* bytes = m.data + at * BYTES;
            if (!(unit & 1)) prefetch(bytes);
            __m512 parts[VECTORS];
            for (auto& part : parts) part = _mm512_setzero_ps();
            for (int half = 0; half < 2; ++half) {
                const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + 16 * half));
                const __m512i pairs = _mm512_cvtepu8_epi32(packed);
                const __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), table);
                const __m512 odd = _mm512_permutexvar_ps(pairs, table);
                for (int v = 0; v < VECTORS; ++v) {
                    const float* vector = vectors + v * x.stride + unit * UNIT + 16 * half;
                    parts[v] = _mm512_fmadd_ps(even, _mm512_loadu_ps(vector), parts[v]);
                    parts[v] = _mm512_fmadd_ps(odd, _mm512_loadu_ps(vector + UNIT / 2), parts[v]);
                }
            }
            const __m512 scale = _mm512_set1_ps(scales[at >> shift]);
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_fmadd_ps(parts[v], scale, sums[r][v]);
        }
    }
    for (int v = 0; v < VECTORS; ++v)
        for (int r = 0; r < ROWS; ++r) out[v * out_stride + r] = _mm512_reduce_add_ps(sums[r][v]);
}

// 16 stored elements as floats.
template <Kind KIND>
LMX_AVX512 inline __m512 load16(const uint8_t* at, __mmask16 mask) {
    if constexpr (KIND == INT8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, at)));
    if constexpr (KIND == KEPT_F32) return _mm512_maskz_loadu_ps(mask, at);
    const __m256i halves = _mm256_maskz_loadu_epi16(mask, at);
    if constexpr (KIND == KEPT_F16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

constexpr int64_t size_of(Kind kind) { return kind == INT8 ? 1 : kind == KEPT_F32 ? 4 : 2; }

// int8 and what was kept in 16 or 32 bits, times float.
template <Kind KIND, int ROWS, int VECTORS>
LMX_AVX512 void plain_rows(const Matrix& m, const Vectors& x, int64_t row, float* out, int64_t out_stride) {
    const float* vectors = static_cast<const float*>(x.data);
    const int64_t whole = m.columns / UNIT * UNIT, size = size_of(KIND);
    const uint8_t* weights = m.data + row * m.columns * size;
    __m512 sums[ROWS][VECTORS][2];
    for (auto& of_row : sums)
        for (auto& of_vector : of_row) of_vector[0] = of_vector[1] = _mm512_setzero_ps();
    for (int64_t c = 0; c < whole; c += UNIT)
        for (int r = 0; r < ROWS; ++r) {
            const uint8_t* at = weights + (r * m.columns + c) * size;
            for (int64_t line = 0; line < UNIT * size; line += 64) prefetch(at + line);
            for (int part = 0; part < 4; ++part) {
                const __m512 values = load16<KIND>(at + 16 * part * size, 0xffff);
                for (int v = 0; v < VECTORS; ++v) {
                    const __m512 vector = _mm512_loadu_ps(vectors + v * x.stride + c + 16 * part);
                    sums[r][v][part & 1] = _mm512_fmadd_ps(values, vector, sums[r][v][part & 1]);
                }
            }
        }
    for (int64_t c = whole; c < m.columns; c += 16) {
        const int64_t left = m.columns - c;
        const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
        for (int r = 0; r < ROWS; ++r) {
            const __m512 values = load16<KIND>(weights + (r * m.columns + c) * size, mask);
            for (int v = 0; v < VECTORS; ++v) {
                const __m512 vector = _mm512_loadu_ps(vectors + v * x.stride + c);
                sums[r][v][0] = _mm512_fmadd_ps(values, vector, sums[r][v][0]);
            }
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        const float scale = KIND == INT8 ? static_cast<const float*>(m.absmax)[row + r] * (1.0f / 127.0f) : 1.0f;
        for (int v = 0; v < VECTORS; ++v)
            out[v * out_stride + r] = scale * _mm512_reduce_add_ps(_mm512_add_ps(sums[r][v][0], sums[r][v][1]));
    }
}

// bf16 times bf16.
template <int ROWS, int VECTORS>
LMX_AVX512 void bf16_rows(const Matrix& m, const Vectors& x, int64_t row, float* out, int64_t out_stride) {
    const bf16* vectors = static_cast<const bf16*>(x.data);
    const bf16* weights = reinterpret_cast<const bf16*>(m.data) + row * m.columns;
    __m512 sums[ROWS][VECTORS];
    for (auto& of_row : sums)
        for (auto& sum : of_row) sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < m.columns; c += 32) {
        const int64_t left = m.columns - c;
        const __mmask32 mask = left >= 32 ? 0xffffffffu : (1u << left) - 1;
        for (int r = 0; r < ROWS; ++r) {
            const bf16* at = weights + r * m.columns + c;
            prefetch(reinterpret_cast<const uint8_t*>(at));
            const __m512bh values = (__m512bh)_mm512_maskz_loadu_epi16(mask, at);
            for (int v = 0; v < VECTORS; ++v) {
                const __m512bh vector = (__m512bh)_mm512_loadu_si512(vectors + v * x.stride + c);
                sums[r][v] = _mm512_dpbf16_ps(sums[r][v], values, vector);
            }
        }
    }
    for (int v = 0; v < VECTORS; ++v)
        for (int r = 0; r < ROWS; ++r) out[v * out_stride + r] = _mm512_reduce_add_ps(sums[r][v]);
}

// Calls of(rows at a time, row) for pairs of rows and a last single one: several streams of memory at once. A row's sums
// are the same either way.
template <int STEP, typename Body>
inline void by_rows(int64_t first, int64_t last, const Body& body) {
    int64_t row = first;
    for (; row + STEP <= last; row += STEP) body.template operator()<STEP>(row);
    for (; row < last; ++row) body.template operator()<1>(row);
}

template <int VECTORS, bool NESTED>
struct FourBit {
    const Matrix& m;
    const Vectors& x;
    int64_t first;
    float* out;
    int64_t out_stride;
    __m512i table;
    template <int ROWS>
    void operator()(int64_t row) const {
        four_bit_rows<ROWS, VECTORS, NESTED>(m, x, row, out + row - first, out_stride, table);
    }
};

template <int VECTORS, bool NESTED>
struct FourBitF32 {
    const Matrix& m;
    const Vectors& x;
    int64_t first;
    float* out;
    int64_t out_stride;
    __m512 table;
    template <int ROWS>
    void operator()(int64_t row) const {
        four_bit_rows_f32<ROWS, VECTORS, NESTED>(m, x, row, out + row - first, out_stride, table);
    }
};

template <Kind KIND, int VECTORS>
struct Plain {
    const Matrix& m;
    const Vectors& x;
    int64_t first;
    float* out;
    int64_t out_stride;
    template <int ROWS>
    void operator()(int64_t row) const {
        plain_rows<KIND, ROWS, VECTORS>(m, x, row, out + row - first, out_stride);
    }
};

template <int VECTORS>
struct Bf16 {
    const Matrix& m;
    const Vectors& x;
    int64_t first;
    float* out;
    int64_t out_stride;
    template <int ROWS>
    void operator()(int64_t row) const {
        bf16_rows<ROWS, VECTORS>(m, x, row, out + row - first, out_stride);
    }
};

LMX_AVX512 __m512i bf16_table(const float* code) {
    bf16 values[32];
    for (int i = 0; i < 32; ++i) values[i] = float_to_bf16(code[i & 15]);
    return _mm512_loadu_si512(values);
}

template <int VECTORS>
LMX_AVX512 void four_bit_of(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out,
                            int64_t out_stride) {
    const __m512i table = bf16_table(m.code);
    if (m.nested_map) by_rows<2>(first, last, FourBit<VECTORS, true>{m, x, first, out, out_stride, table});
    else by_rows<2>(first, last, FourBit<VECTORS, false>{m, x, first, out, out_stride, table});
}

template <int VECTORS>
LMX_AVX512 void four_bit_f32_of(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out,
                                int64_t out_stride) {
    const __m512 table = _mm512_loadu_ps(m.code);
    if (m.nested_map) by_rows<2>(first, last, FourBitF32<VECTORS, true>{m, x, first, out, out_stride, table});
    else by_rows<2>(first, last, FourBitF32<VECTORS, false>{m, x, first, out, out_stride, table});
}

template <int VECTORS>
void bf16_of(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t out_stride) {
    by_rows<2>(first, last, Bf16<VECTORS>{m, x, first, out, out_stride});
}

template <Kind KIND, int VECTORS>
void plain_of(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t out_stride) {
    by_rows<2>(first, last, Plain<KIND, VECTORS>{m, x, first, out, out_stride});
}

#define LMX_BY_COUNT(NAME, ONE, TWO, THREE, FOUR)                                                               \
    void NAME(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t out_stride) { \
        static constexpr RowsFunction by_count[] = {ONE, TWO, THREE, FOUR};                                     \
        by_count[x.count - 1](m, x, first, last, out, out_stride);                                              \
    }

LMX_BY_COUNT(four_bit_bf16, four_bit_of<1>, four_bit_of<2>, four_bit_of<3>, four_bit_of<4>)
LMX_BY_COUNT(four_bit_f32, four_bit_f32_of<1>, four_bit_f32_of<2>, four_bit_f32_of<3>, four_bit_f32_of<4>)
LMX_BY_COUNT(kept_bf16, bf16_of<1>, bf16_of<2>, bf16_of<3>, bf16_of<4>)

template <Kind KIND>
LMX_BY_COUNT(plain, (plain_of<KIND, 1>), (plain_of<KIND, 2>), (plain_of<KIND, 3>), (plain_of<KIND, 4>))

}  // namespace

Kernel avx512_kernel(Kind kind, Dtype dtype) {
    switch (kind) {
        case FOUR_BIT: return dtype == BF16 ? Kernel{SPLIT_BF16, four_bit_bf16} : Kernel{SPLIT_F32, four_bit_f32};
        case INT8: return {PLAIN_F32, plain<INT8>};
        case KEPT_BF16: return dtype == BF16 ? Kernel{PLAIN_BF16, kept_bf16} : Kernel{PLAIN_F32, plain<KEPT_BF16>};
        case KEPT_F16: return {PLAIN_F32, plain<KEPT_F16>};
        default: return {PLAIN_F32, plain<KEPT_F32>};
    }
}

}  // namespace lmx

#endif
