// Matrices times a few vectors with AVX-512 and its BF16 instructions.
#include <algorithm>
#include <cmath>

#include "exponential.h"
#include "vector.h"

#if defined(LMX_X86)

namespace lmx {
namespace {

constexpr int64_t BYTES = UNIT / 2;  // a unit in four bits
// How far ahead of themselves rows of four bits are asked for, into the second cache: the first has no room for a group of
// wide rows, the next group and x, so that those asked for into it took longer.
// Wider kinds take no less time for being asked: one row after another, the hardware sees them coming.
constexpr int64_t AHEAD = 24576;

// Always inline: a call of a function that does nothing but this is taken for one that does nothing.
LMX_INLINE LMX_AVX512 void prefetch(const uint8_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1); }

// 16 values, twice.
LMX_AVX512 __m512i table_of(const bf16* values) {
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

// Scales of the blocks of a few rows that are read side by side: as they are, or decoded from their codes by a table of
// all 256 for the group of 256 blocks that a row is in.
template <int ROWS, bool NESTED>
class RowScales {
public:
    explicit RowScales(const Matrix& m) : m_(m) { std::fill_n(groups_, ROWS, -1); }
    // Before a block is asked for.
    LMX_INLINE LMX_AVX512 void enter(int row, int64_t block) {
        if constexpr (NESTED)
            if (block >> 8 != groups_[row]) decode(row, block >> 8);
    }
    LMX_INLINE LMX_AVX512 const float* at(int row, int64_t block) const {
        if constexpr (NESTED) return current_[row] + static_cast<const uint8_t*>(m_.absmax)[block];
        return static_cast<const float*>(m_.absmax) + block;
    }

private:
    LMX_AVX512 __attribute__((noinline)) void decode(int row, int64_t group) {
        groups_[row] = group;
        for (int other = 0; other < ROWS; ++other)
            if (other != row && groups_[other] == group) {
                current_[row] = current_[other];
                return;
            }
        float* table = tables_[0];
        for (int other = 0; other < ROWS; ++other)
            if (other != row && current_[other] == table) table = tables_[1];
        const __m512 absmax = _mm512_set1_ps(m_.nested_absmax[group]), offset = _mm512_set1_ps(m_.nested_offset);
        for (int i = 0; i < 256; i += 16)
            _mm512_store_ps(table + i, _mm512_fmadd_ps(_mm512_loadu_ps(m_.nested_map + i), absmax, offset));
        current_[row] = table;
    }
    static_assert(!NESTED || ROWS <= 2, "each row needs a table of its own");
    const Matrix& m_;
    alignas(64) float tables_[NESTED ? 2 : 1][NESTED ? 256 : 1];
    const float* current_[ROWS] = {};
    int64_t groups_[ROWS];
};

// Four bits times bf16, 128 elements at a time: 64 bytes are 32 words of four codes each. The 16 values stand twice in a
// register of 32 lanes, and `vpermw` looks at the lowest five bits of a word: a shift brings each code there, and what
// lies above needs no mask. The first half of the lanes belongs to one unit, the second to the next: sums in float, then
// times their blocks' scales.
//
// Rows side by side share the loads of x, which are most of all loads and else the bottleneck.
template <int ROWS, int VECTORS, bool NESTED>
LMX_AVX512 LMX_INLINE void four_bit_rows(const Matrix& m, const Vectors& x, int64_t row, float* out, int64_t out_stride,
                                         __m512i table, RowScales<ROWS, NESTED>& scales) {
    const int64_t units = m.columns / UNIT, bytes_of_row = units * BYTES;
    const int shift = log2_of(m.block_size / UNIT);
    const uint8_t* bytes = m.data + row * bytes_of_row;
    // What memory is asked for goes from front to back all the same, some rows ahead: two streams are slower.
    const uint8_t* soon = bytes + ROWS * bytes_of_row * std::max<int64_t>(1, AHEAD / (ROWS * bytes_of_row));
    const bf16* vectors = static_cast<const bf16*>(x.data);
    __m512 sums[ROWS][VECTORS];
    for (auto& of_row : sums)
        for (auto& sum : of_row) sum = _mm512_setzero_ps();
    for (int64_t unit = 0; unit < units; unit += 2) {
        __m512bh values[ROWS][4];
        for (int r = 0; r < ROWS; ++r) {
            const uint8_t* at = bytes + r * bytes_of_row + unit * BYTES;
            prefetch(soon + r * 2 * BYTES);
            const __m512i words = _mm512_loadu_si512(at);
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
        for (int r = 0; r < ROWS; ++r) {
            const int64_t at = (row + r) * units + unit, block = at >> shift;
            scales.enter(r, block);
            const __m512 both = _mm512_mask_broadcastss_ps(_mm512_set1_ps(*scales.at(r, block)), 0xff00,
                                                           _mm_load_ss(scales.at(r, (at + 1) >> shift)));
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_fmadd_ps(parts[r][v], both, sums[r][v]);
        }
    }
    const __m128 factor = _mm_set1_ps(code_scale(m));
    for (int v = 0; v < VECTORS; ++v) {
        alignas(16) float answers[4];
        const __m512 last = sums[ROWS - 1][v];
        const __m128 four = sums_of_four(sums[0][v], sums[ROWS > 1][v], ROWS > 2 ? sums[ROWS > 2 ? 2 : 0][v] : last, last);
        _mm_store_ps(answers, _mm_mul_ps(four, factor));
        std::memcpy(out + v * out_stride, answers, ROWS * sizeof(float));
    }
}

template <int VECTORS, bool NESTED>
LMX_AVX512 void four_bit_all(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out,
                             int64_t out_stride) {
    const __m512i table = table_of(rounded_code(m));
    constexpr int SIDE = VECTORS == 1 && !NESTED ? 4 : 2;
    RowScales<SIDE, NESTED> scales(m);
    RowScales<1, NESTED> last_scales(m);
    int64_t row = first;
    for (; row + SIDE <= last; row += SIDE, out += SIDE)
        four_bit_rows<SIDE, VECTORS>(m, x, row, out, out_stride, table, scales);
    for (; row < last; ++row, ++out) four_bit_rows<1, VECTORS>(m, x, row, out, out_stride, table, last_scales);
}

template <int VECTORS>
void four_bit_of(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t out_stride) {
    if (m.nested_map) four_bit_all<VECTORS, true>(m, x, first, last, out, out_stride);
    else four_bit_all<VECTORS, false>(m, x, first, last, out, out_stride);
}

// Scales of a matrix, plain or decoded on the way.
template <bool NESTED>
struct Scales {
    const Matrix& m;
    inline float operator[](int64_t block) const {
        if constexpr (NESTED) return block_scale(m, block);
        return static_cast<const float*>(m.absmax)[block];
    }
};

// Four bits times float, in float all through.
template <int VECTORS, bool NESTED>
LMX_AVX512 void four_bit_row_f32(const Matrix& m, const Vectors& x, int64_t row, float* out, int64_t out_stride,
                                 __m512 table) {
    const int64_t units = m.columns / UNIT, first = row * units;
    const int shift = log2_of(m.block_size / UNIT);
    const float* vectors = static_cast<const float*>(x.data);
    const Scales<NESTED> scales{m};
    const uint8_t* bytes = m.data + first * BYTES;
    __m512 sums[VECTORS];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    for (int64_t unit = 0; unit < units; ++unit, bytes += BYTES) {
        prefetch(bytes + AHEAD);
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
template <int VECTORS>
LMX_AVX512 void bf16_row(const Matrix& m, const Vectors& x, int64_t row, float* out, int64_t out_stride) {
    const bf16* vectors = static_cast<const bf16*>(x.data);
    const bf16* weights = reinterpret_cast<const bf16*>(m.data) + row * m.columns;
    __m512 sums[VECTORS][4];
    for (auto& of_vector : sums)
        for (auto& sum : of_vector) sum = _mm512_setzero_ps();
    int64_t c = 0;
    for (; c + 128 <= m.columns; c += 128)
        for (int part = 0; part < 4; ++part) {
            const bf16* at = weights + c + 32 * part;
            const __m512bh values = (__m512bh)_mm512_loadu_si512(at);
            for (int v = 0; v < VECTORS; ++v) {
                const __m512bh vector = (__m512bh)_mm512_loadu_si512(vectors + v * x.stride + c + 32 * part);
                sums[v][part] = _mm512_dpbf16_ps(sums[v][part], values, vector);
            }
        }
    for (; c < m.columns; c += 32) {
        const int64_t left = m.columns - c;
        const __mmask32 mask = left >= 32 ? 0xffffffffu : (1u << left) - 1;
        const __m512bh values = (__m512bh)_mm512_maskz_loadu_epi16(mask, weights + c);
        for (int v = 0; v < VECTORS; ++v) {
            const __m512bh vector = (__m512bh)_mm512_loadu_si512(vectors + v * x.stride + c);
            sums[v][0] = _mm512_dpbf16_ps(sums[v][0], values, vector);
        }
    }
    for (int v = 0; v < VECTORS; ++v) {
        const __m512 sum = _mm512_add_ps(_mm512_add_ps(sums[v][0], sums[v][1]), _mm512_add_ps(sums[v][2], sums[v][3]));
        out[v * out_stride] = _mm512_reduce_add_ps(sum);
    }
}

// int8 times bf16, by its nibbles: a byte is 16 h + l, and both parts come out of tables, exact in bf16. Converting to
// float takes no longer, but reads four times the bytes of x, and they do not stay in the nearest cache.
template <int VECTORS>
LMX_AVX512 void int8_row(const Matrix& m, const Vectors& x, int64_t row, float* out, int64_t out_stride, __m512i low,
                         __m512i high) {
    const bf16* vectors = static_cast<const bf16*>(x.data);
    const uint8_t* weights = m.data + row * m.columns;
    __m512 sums[VECTORS][2];
    for (auto& sum : sums) sum[0] = sum[1] = _mm512_setzero_ps();
    for (int64_t c = 0; c < m.columns; c += UNIT) {
        const __m512i words = _mm512_loadu_si512(weights + c);
        const __m512bh even[] = {(__m512bh)_mm512_permutexvar_epi16(words, low),
                                 (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), high)};
        const __m512bh odd[] = {(__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), low),
                                (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), high)};
        for (int v = 0; v < VECTORS; ++v) {
            const bf16* vector = vectors + v * x.stride + c;
            const __m512bh evens = (__m512bh)_mm512_loadu_si512(vector);
            const __m512bh odds = (__m512bh)_mm512_loadu_si512(vector + UNIT / 2);
            for (int i = 0; i < 2; ++i) {
                sums[v][i] = _mm512_dpbf16_ps(sums[v][i], even[i], evens);
                sums[v][i] = _mm512_dpbf16_ps(sums[v][i], odd[i], odds);
            }
        }
    }
    const float scale = static_cast<const float*>(m.absmax)[row] * INVERSE_127;
    for (int v = 0; v < VECTORS; ++v)
        out[v * out_stride] = scale * _mm512_reduce_add_ps(_mm512_add_ps(sums[v][0], sums[v][1]));
}

// The same by whole elements, for what is infinite: times the two parts of one element it can be infinity less infinity.
float int8_row_whole(const Matrix& m, const Vectors& x, int64_t row, int v) {
    const bf16* vector = static_cast<const bf16*>(x.data) + v * x.stride;
    const uint8_t* weights = m.data + row * m.columns;
    float sum = 0;
    for (int64_t c = 0; c < m.columns; ++c) {
        const int64_t at = c / UNIT * UNIT + c % 2 * (UNIT / 2) + c % UNIT / 2;
        sum += static_cast<float>(static_cast<int8_t>(weights[c])) * bf16_to_float(vector[at]);
    }
    return sum * static_cast<const float*>(m.absmax)[row] * (1.0f / 127.0f);
}

template <int VECTORS>
LMX_AVX512 void int8_of(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out,
                        int64_t out_stride) {
    bf16 low[16], high[16];
    for (int i = 0; i < 16; ++i) {
        low[i] = float_to_bf16(static_cast<float>(i));
        high[i] = float_to_bf16(16.0f * static_cast<float>(i < 8 ? i : i - 16));
    }
    const __m512i lows = table_of(low), highs = table_of(high);
    for (int64_t row = first; row < last; ++row) {
        int8_row<VECTORS>(m, x, row, out + row - first, out_stride, lows, highs);
        for (int v = 0; v < VECTORS; ++v) {
            float& answer = out[v * out_stride + row - first];
            if (!std::isfinite(answer)) answer = int8_row_whole(m, x, row, v);
        }
    }
}

template <int VECTORS>
LMX_AVX512 void four_bit_f32_of(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out,
                                int64_t out_stride) {
    const __m512 table = _mm512_loadu_ps(m.code);
    const auto of_row = m.nested_map ? four_bit_row_f32<VECTORS, true> : four_bit_row_f32<VECTORS, false>;
    for (int64_t row = first; row < last; ++row) of_row(m, x, row, out + row - first, out_stride, table);
}

template <int VECTORS>
void bf16_of(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t out_stride) {
    for (int64_t row = first; row < last; ++row) bf16_row<VECTORS>(m, x, row, out + row - first, out_stride);
}

template <Kind KIND, int VECTORS>
void plain_of(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t out_stride) {
    for (int64_t row = first; row < last; ++row) plain_row<KIND, VECTORS>(m, x, row, out + row - first, out_stride);
}

#define LMX_BY_COUNT(NAME, ONE, TWO, THREE, FOUR)                                                               \
    void NAME(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t out_stride) { \
        static constexpr RowsFunction by_count[] = {ONE, TWO, THREE, FOUR};                                     \
        by_count[x.count - 1](m, x, first, last, out, out_stride);                                              \
    }

LMX_BY_COUNT(four_bit_bf16, four_bit_of<1>, four_bit_of<2>, four_bit_of<3>, four_bit_of<4>)
LMX_BY_COUNT(four_bit_f32, four_bit_f32_of<1>, four_bit_f32_of<2>, four_bit_f32_of<3>, four_bit_f32_of<4>)
LMX_BY_COUNT(int8_bf16, int8_of<1>, int8_of<2>, int8_of<3>, int8_of<4>)
LMX_BY_COUNT(kept_bf16, bf16_of<1>, bf16_of<2>, bf16_of<3>, bf16_of<4>)

template <Kind KIND>
LMX_BY_COUNT(plain, (plain_of<KIND, 1>), (plain_of<KIND, 2>), (plain_of<KIND, 3>), (plain_of<KIND, 4>))

}  // namespace

Kernel avx512_kernel(const Matrix& m, Dtype dtype) {
    switch (m.kind) {
        case FOUR_BIT:
            if (dtype == BF16 && m.columns % (2 * UNIT) == 0) return {QUARTERED_BF16, four_bit_bf16};
            return {SPLIT_F32, four_bit_f32};
        case INT8:
            if (dtype == BF16 && m.columns % UNIT == 0) return {SPLIT_BF16, int8_bf16};
            return {PLAIN_F32, plain<INT8>};
        case KEPT_BF16: return dtype == BF16 ? Kernel{PLAIN_BF16, kept_bf16} : Kernel{PLAIN_F32, plain<KEPT_BF16>};
        case KEPT_F16: return {PLAIN_F32, plain<KEPT_F16>};
        default: return {PLAIN_F32, plain<KEPT_F32>};
    }
}

}  // namespace lmx

#endif
