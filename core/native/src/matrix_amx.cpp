// Matrices times many vectors with AMX: tiles of 16 rows by 32 columns, times tiles of 16 vectors.
#include <algorithm>

#include "decode.h"
#include "scratch.h"

#if defined(LMX_AMX)

namespace lmx {
namespace {

// Rows and vectors of a tile; columns are a STEP.
constexpr int64_t SIDE = 16;
// Two tiles of rows times two of vectors: four of sums, for four loads.
constexpr int64_t BLOCK = 2 * SIDE;
// Columns at a time: a block of rows decoded, and all vectors of a panel, 64 and 512 KB, stay in the second cache.
constexpr int64_t STRETCH_OF_TILES = 1024;
constexpr int64_t SUMS = SIDE * SIDE;

// For each stretch of columns, for each 16 vectors (the last may be fewer), panels hold step after step: for each pair of
// its columns the two elements of every vector. So TDPBF16PS wants its second operand (Intel, Instruction Set Extensions
// Programming Reference, chapter 3).
LMX_AVX512 void pack(const bf16* x, int64_t first, int64_t count, int64_t columns, int64_t index, int64_t vectors,
                     bf16* panel) {
    const int64_t group = index / SIDE * SIDE, together = std::min(SIDE, vectors - group);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i places = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(together)));
    for (int64_t c = first; c < first + count; c += 2 * UNIT) {
        const int64_t start = c / STRETCH_OF_TILES * STRETCH_OF_TILES;
        const int64_t depth = packed_columns(std::min(STRETCH_OF_TILES, columns - start));
        bf16* out = panel + start * vectors + group * depth + (c - start) * together + (index - group) * 2;
        const Quarters quarters = quartered(x + c - first, first + count - c);
        for (int i = 0; i < 4; ++i) _mm512_i32scatter_epi32(out + i * together * STEP, places, quarters.part[i], 4);
    }
}

// What the tiles hold: 0 to 3 sums, 4 and 5 rows, 6 and 7 vectors.
struct alignas(64) Shapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    // For the numbers of vectors in two tiles.
    Shapes(int64_t first, int64_t second) {
        for (int t = 0; t < 8; ++t) {
            rows[t] = SIDE;
            row_bytes[t] = static_cast<uint16_t>(4 * (t & 1 ? second : first));
        }
        row_bytes[4] = row_bytes[5] = STEP * sizeof(bf16);
    }

    // GCC's own `_tile_loadconfig` says that it reads eight of the 64 bytes, and the rest may never be written.
    LMX_AMX void load() const { asm volatile("ldtilecfg %0" : : "m"(*this)); }
};
static_assert(sizeof(Shapes) == 64, "as LDTILECFG reads it");

// The tiles' memory is read and written behind the compiler's back.
LMX_INLINE void settle() { asm volatile("" ::: "memory"); }

// A block of rows times a block of vectors over some steps, added to the sums of the columns before, if any. `rows` and
// `vectors` tiles, one or two; sums of a tile of rows are `next_rows` from the other's.
template <int ROWS, int VECTORS>
LMX_AMX void multiply_block(const bf16* weights, const bf16* x, int64_t depth, int64_t last_vectors, bool first,
                            float* sums, int64_t next_rows) {
    constexpr int64_t STRIDE = SIDE * 4;
    const int64_t first_stride = VECTORS == 2 ? STRIDE : last_vectors * 4, second_stride = last_vectors * 4;
    const bf16 *more_weights = weights + SIDE * depth, *more_x = x + SIDE * depth;
    if (first) {
        _tile_zero(0);
        if (VECTORS == 2) _tile_zero(1);
        if (ROWS == 2) _tile_zero(2);
        if (ROWS == 2 && VECTORS == 2) _tile_zero(3);
    } else {
        _tile_loadd(0, sums, STRIDE);
        if (VECTORS == 2) _tile_loadd(1, sums + SUMS, STRIDE);
        if (ROWS == 2) _tile_loadd(2, sums + next_rows, STRIDE);
        if (ROWS == 2 && VECTORS == 2) _tile_loadd(3, sums + next_rows + SUMS, STRIDE);
    }
    for (int64_t k = 0; k < depth; k += STEP) {
        _tile_loadd(4, weights + k * SIDE, STRIDE);
        _tile_loadd(6, x + k * first_stride / 4, first_stride);
        _tile_dpbf16ps(0, 4, 6);
        if (ROWS == 2) {
            _tile_loadd(5, more_weights + k * SIDE, STRIDE);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (VECTORS == 2) {
            _tile_loadd(7, more_x + k * second_stride / 4, second_stride);
            _tile_dpbf16ps(1, 4, 7);
            if (ROWS == 2) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, STRIDE);
    if (VECTORS == 2) _tile_stored(1, sums + SUMS, STRIDE);
    if (ROWS == 2) _tile_stored(2, sums + next_rows, STRIDE);
    if (ROWS == 2 && VECTORS == 2) _tile_stored(3, sums + next_rows + SUMS, STRIDE);
}

using BlockFunction = void (*)(const bf16*, const bf16*, int64_t, int64_t, bool, float*, int64_t);
constexpr BlockFunction BLOCKS[2][2] = {{multiply_block<1, 1>, multiply_block<1, 2>},
                                        {multiply_block<2, 1>, multiply_block<2, 2>}};

// A tile of sums [row][vector] to out[vector * out_stride + row].
LMX_AVX512 void put_sums(const float* sums, int64_t vectors, int64_t rows, float* out, int64_t out_stride) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i places = _mm512_slli_epi32(lanes, 4);
    const auto mask = static_cast<__mmask16>((1u << rows) - 1);
    for (int64_t v = 0; v < vectors; ++v)
        _mm512_mask_storeu_ps(out + v * out_stride, mask, _mm512_i32gather_ps(places, sums + v, 4));
}

// What a thread needs: a block of rows, decoded, and the sums of all rows of a call.
struct Memory {
    Kept<bf16> weights{BLOCK * STRETCH_OF_TILES};
    Kept<float> sums{MOST_ROWS * PANEL};
};

LMX_AMX void multiply_some(const Matrix& m, const bf16* panel, int64_t count, int64_t first, int64_t last, float* out,
                           int64_t out_stride) {
    static thread_local Memory memory;
    bf16* weights = memory.weights.data();
    const int64_t tiles = (count + SIDE - 1) / SIDE, next_rows = tiles * SUMS;
    const auto sums_at = [&](int64_t row, int64_t v) {
        return memory.sums.data() + (row - first) / SIDE * next_rows + v / SIDE * SUMS;
    };
    int64_t shaped = 0;
    for (int64_t c = 0; c < m.columns; c += STRETCH_OF_TILES) {
        const int64_t stop = std::min(c + STRETCH_OF_TILES, m.columns), depth = packed_columns(stop - c);
        for (int64_t row = first; row < last; row += BLOCK) {
            const int64_t end = std::min(row + BLOCK, last);
            decode_rows(m, row, end, c, stop, SIDE, weights);
            settle();
            for (int64_t v = 0; v < count; v += BLOCK) {
                const int64_t here = std::min(BLOCK, count - v), of_last = (here - 1) % SIDE + 1;
                if (shaped != here) Shapes(std::min(SIDE, here), of_last).load();
                shaped = here;
                BLOCKS[end - row > SIDE][here > SIDE](weights, panel + c * count + v * depth, depth, of_last, c == 0,
                                                      sums_at(row, v), next_rows);
            }
            settle();
        }
    }
    _tile_release();
    for (int64_t row = first; row < last; row += SIDE)
        for (int64_t v = 0; v < count; v += SIDE)
            put_sums(sums_at(row, v), std::min(SIDE, count - v), std::min(SIDE, last - row),
                     out + v * out_stride + row - first, out_stride);
}

void multiply(const Matrix& m, const bf16* panel, int64_t count, int64_t first, int64_t last, float* out,
              int64_t out_stride) {
    for (int64_t row = first; row < last; row += MOST_ROWS)
        multiply_some(m, panel, count, row, std::min(row + MOST_ROWS, last), out + row - first, out_stride);
    scale_int8(m, count, first, last, out, out_stride);
}

}  // namespace

const Panels amx_panels{MOST_ROWS, pack, multiply};

}  // namespace lmx

#elif defined(LMX_X86)

namespace lmx {
const Panels amx_panels{};  // never chosen: cpu.cpp finds no tiles
}  // namespace lmx

#endif
