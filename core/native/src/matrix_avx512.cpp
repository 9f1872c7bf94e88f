// Matrices times many vectors with AVX-512's BF16 instructions.
#include "matrix.h"

#include <algorithm>

#include "exponential.h"

#if defined(LMX_X86)

namespace lmx {
namespace {

// Rows and vectors of which all pairs are summed in registers at once: 24 of 32 hold sums.
constexpr int ROWS = 4, VECTORS_AT_ONCE = 6;

// Values of 32 four-bit codes times their scale, as bf16 in their own order.
LMX_AVX512 LMX_INLINE void decode_32(const uint8_t* bytes, float scale, __m512 table, __m512i order, bf16* out) {
    const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    const __m512 scales = _mm512_set1_ps(scale);
    const __m512 even = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), table), scales);
    const __m512 odd = _mm512_mul_ps(_mm512_permutexvar_ps(pairs, table), scales);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(order, both));
}

// Where the even and the odd elements of 32 go.
LMX_AVX512 __m512i interleaved() {
    alignas(64) uint16_t order[32];
    for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / 2 + (i & 1) * 16);
    return _mm512_load_si512(order);
}

LMX_AVX512 void decode_four_bit(const Matrix& m, int64_t row, int64_t first, int64_t last, bf16* out) {
    const int64_t start = row * m.columns;
    if (m.columns % UNIT || m.block_size < UNIT) {
        for (int64_t c = first; c < last; ++c) {
            const int64_t at = start + c;
            const uint8_t byte = m.data[at >> 1];
            const float scale = block_scale(m, at >> log2_of(m.block_size));
            out[c - first] = float_to_bf16(m.code[at & 1 ? byte & 15 : byte >> 4] * scale);
        }
        return;
    }
    const __m512 table = _mm512_loadu_ps(m.code);
    const __m512i order = interleaved();
    const int shift = log2_of(m.block_size);
    for (int64_t c = first; c < last; c += UNIT) {
        const float scale = block_scale(m, (start + c) >> shift);
        const uint8_t* bytes = m.data + (start + c) / 2;
        _mm_prefetch(reinterpret_cast<const char*>(bytes + 2048), _MM_HINT_T0);
        decode_32(bytes, scale, table, order, out + c - first);
        decode_32(bytes + 16, scale, table, order, out + c - first + 32);
    }
}

// int8 is exact in bf16; its scale waits for the sum.
LMX_AVX512 void decode_int8(const Matrix& m, int64_t row, int64_t first, int64_t last, bf16* out) {
    const int8_t* bytes = reinterpret_cast<const int8_t*>(m.data) + row * m.columns;
    int64_t c = first;
    for (; c + STEP <= last; c += STEP) {
        const __m128i* at = reinterpret_cast<const __m128i*>(bytes + c);
        const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at)));
        const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at + 1)));
        _mm512_storeu_si512(out + c - first, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    for (; c < last; ++c) out[c - first] = float_to_bf16(bytes[c]);
}

void decode_kept(const Matrix& m, int64_t row, int64_t first, int64_t last, bf16* out) {
    const int64_t at = row * m.columns + first;
    if (m.kind == KEPT_BF16) {
        std::memcpy(out, m.data + 2 * at, static_cast<size_t>(last - first) * 2);
        return;
    }
    for (int64_t c = 0; c < last - first; ++c) {
        float value;
        std::memcpy(&value, m.data + 4 * (at + c), 4);
        out[c] = float_to_bf16(value);
    }
}

// The columns first .. last of a row as bf16, and zeros up to a whole step.
void decode(const Matrix& m, int64_t row, int64_t first, int64_t last, bf16* out) {
    if (m.kind == FOUR_BIT) decode_four_bit(m, row, first, last, out);
    else if (m.kind == INT8) decode_int8(m, row, first, last, out);
    else decode_kept(m, row, first, last, out);
    for (int64_t c = last - first; c % STEP; ++c) out[c] = 0;
}

// Adds to sums [ROWS][VECTORS] the products over `depth` columns.
template <int VECTORS>
LMX_AVX512 void multiply_tile(const bf16* weights, const bf16* x, int64_t stride, int64_t depth, __m512* sums) {
    __m512 tile[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) tile[r][v] = sums[r * VECTORS + v];
    for (int64_t k = 0; k < depth; k += STEP) {
        __m512bh vectors[VECTORS];
        for (int v = 0; v < VECTORS; ++v) vectors[v] = (__m512bh)_mm512_loadu_si512(x + v * stride + k);
        for (int r = 0; r < ROWS; ++r) {
            const __m512bh row = (__m512bh)_mm512_loadu_si512(weights + r * DEPTH + k);
            for (int v = 0; v < VECTORS; ++v) tile[r][v] = _mm512_dpbf16_ps(tile[r][v], row, vectors[v]);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) sums[r * VECTORS + v] = tile[r][v];
}

using TileFunction = void (*)(const bf16*, const bf16*, int64_t, int64_t, __m512*);
constexpr TileFunction TILES[] = {multiply_tile<1>, multiply_tile<2>, multiply_tile<3>,
                                    multiply_tile<4>, multiply_tile<5>, multiply_tile<6>};

// The sum of each of 16 registers, as one register.
LMX_AVX512 LMX_INLINE __m512 sums_of(const __m512* s) {
    __m512 quarter[4];
    for (int i = 0; i < 4; ++i) {
        const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(s[4 * i], s[4 * i + 1]), _mm512_unpackhi_ps(s[4 * i], s[4 * i + 1]));
        const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(s[4 * i + 2], s[4 * i + 3]), _mm512_unpackhi_ps(s[4 * i + 2], s[4 * i + 3]));
        // In each 128 bits: the sums over them of registers 4i, 4i + 1, 4i + 2, 4i + 3.
        quarter[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))),
                                   _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))));
    }
    const __m512 c = _mm512_add_ps(_mm512_shuffle_f32x4(quarter[0], quarter[1], 0x88),
                                   _mm512_shuffle_f32x4(quarter[0], quarter[1], 0xdd));
    const __m512 d = _mm512_add_ps(_mm512_shuffle_f32x4(quarter[2], quarter[3], 0x88),
                                   _mm512_shuffle_f32x4(quarter[2], quarter[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd));
}

}  // namespace

bool has_panels() { return level() == AVX512; }

LMX_AVX512 void multiply_panel(const Matrix& m, const bf16* packed, int64_t count, int64_t first, int64_t last,
                               float* out, int64_t out_stride) {
    constexpr int TILE = (ROWS * VECTORS_AT_ONCE + 15) / 16 * 16;  // whole sixteens, which are added up at once
    alignas(64) bf16 weights[ROWS * DEPTH];
    alignas(64) __m512 sums[(PANEL + VECTORS_AT_ONCE - 1) / VECTORS_AT_ONCE][TILE];
    const int64_t groups = (count + VECTORS_AT_ONCE - 1) / VECTORS_AT_ONCE;
    for (int64_t row = first; row < last; row += ROWS) {
        const int64_t rows = std::min<int64_t>(ROWS, last - row);
        for (int64_t g = 0; g < groups; ++g)
            for (auto& sum : sums[g]) sum = _mm512_setzero_ps();
        for (int64_t c = 0; c < m.columns; c += DEPTH) {
            const int64_t stop = std::min(c + DEPTH, m.columns), depth = packed_columns(stop - c);
            for (int64_t r = 0; r < ROWS; ++r) {
                if (r < rows) decode(m, row + r, c, stop, weights + r * DEPTH);
                else std::memset(weights + r * DEPTH, 0, static_cast<size_t>(depth) * 2);
            }
            const bf16* stretch = packed + c * count;
            for (int64_t g = 0; g < groups; ++g) {
                const int64_t vectors = std::min<int64_t>(VECTORS_AT_ONCE, count - g * VECTORS_AT_ONCE);
                TILES[vectors - 1](weights, stretch + g * VECTORS_AT_ONCE * depth, depth, depth, sums[g]);
            }
        }
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t vectors = std::min<int64_t>(VECTORS_AT_ONCE, count - g * VECTORS_AT_ONCE);
            alignas(64) float totals[TILE];
            for (int part = 0; part < TILE; part += 16) _mm512_store_ps(totals + part, sums_of(sums[g] + part));
            for (int64_t v = 0; v < vectors; ++v)
                for (int64_t r = 0; r < rows; ++r) {
                    const float scale = m.kind == INT8 ? static_cast<const float*>(m.absmax)[row + r] * INVERSE_127 : 1.0f;
                    out[(g * VECTORS_AT_ONCE + v) * out_stride + row - first + r] = scale * totals[r * vectors + v];
                }
        }
    }
}

}  // namespace lmx

#else

namespace lmx {
bool has_panels() { return false; }
void multiply_panel(const Matrix&, const bf16*, int64_t, int64_t, int64_t, float*, int64_t) {}
}  // namespace lmx

#endif
