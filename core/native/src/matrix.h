// Matrices times many vectors: weights are decoded to bf16 a block of rows at a time, right where they are multiplied.
#pragma once

#include "vector.h"

namespace lmx {

// Elements in a register.
constexpr int64_t STEP = 32;
// Columns that are decoded and multiplied at a time, at most: of so many a group of vectors stays in the first cache while rows
// pass by.
constexpr int64_t DEPTH = 1024;
// Vectors that a block of rows is decoded for; for the next so many it is decoded again.
constexpr int64_t PANEL = 256;

// Packed vectors lie as their path reads them. Columns are in the order QUARTERED_BF16, which four-bit codes are decoded
// to with the least work, and padded with zeros to whole pairs of units.
inline int64_t packed_columns(int64_t columns) { return (columns + 2 * UNIT - 1) / (2 * UNIT) * (2 * UNIT); }
inline int64_t packed_size(int64_t vectors, int64_t columns) { return vectors * packed_columns(columns); }

// How a path multiplies by panels of vectors.
struct Panels {
    // Rows that `multiply` had better be given: for each call it goes through the panel once.
    int64_t rows;
    // The columns first .. first + count (a multiple of 2 * UNIT, but at the end of a row) of bf16 vector `index` into a
    // panel of `vectors`. x begins at `first`.
    void (*pack)(const bf16* x, int64_t first, int64_t count, int64_t columns, int64_t index, int64_t vectors,
                 bf16* panel);
    // Rows first .. last of a matrix times a panel of `count` vectors: out[v * out_stride + row - first], where out_stride
    // is a multiple of 16, and enough for the rows.
    void (*multiply)(const Matrix& m, const bf16* panel, int64_t count, int64_t first, int64_t last, float* out,
                     int64_t out_stride);
};
constexpr int64_t MOST_ROWS = 256;

// Of the path in use, or null.
const Panels* panels();

#if defined(LMX_X86)
extern const Panels avx512_panels, amx_panels;
#endif

// What int8 waits for: its rows' scales.
inline void scale_int8(const Matrix& m, int64_t count, int64_t first, int64_t last, float* out, int64_t out_stride) {
    if (m.kind != INT8) return;
    const float* scales = static_cast<const float*>(m.absmax);
    for (int64_t v = 0; v < count; ++v)
        for (int64_t r = first; r < last; ++r) out[v * out_stride + r - first] *= scales[r] * INVERSE_127;
}

}  // namespace lmx
