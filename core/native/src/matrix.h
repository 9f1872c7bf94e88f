// Matrices times many vectors: weights are decoded to bf16 a block of rows at a time, right where they are multiplied.
#pragma once

#include "vector.h"

namespace lmx {

// Rows and columns that are decoded and multiplied at a time, 128 KB of them: they stay in the second cache while all
// vectors pass by. Shorter stretches of columns cost more additions across registers at their ends than they save.
constexpr int64_t DEPTH = 4096;
constexpr int64_t ROWS_AT_ONCE = 16;
// Vectors whose products with a row are summed in registers together, at most.
constexpr int64_t AT_ONCE = 6;
// Elements in a register.
constexpr int64_t STEP = 32;
// Vectors that a block of rows is decoded for; for the next so many it is decoded again.
constexpr int64_t PANEL = 256;

// Packed vectors lie as they are read. For each stretch of DEPTH columns, for each group of vectors (the last may be
// smaller): one step of every vector, the next step of every vector, and so on. Columns are in the order QUARTERED_BF16,
// which four-bit codes are decoded to with the least work, and padded with zeros to whole pairs of units.
//
// Groups are even rather than full: eight vectors are four and four, since two would leave the registers half empty.
inline int64_t group_size(int64_t vectors) {
    const int64_t groups = (vectors + AT_ONCE - 1) / AT_ONCE;
    return (vectors + groups - 1) / groups;
}
inline int64_t packed_columns(int64_t columns) { return (columns + 2 * UNIT - 1) / (2 * UNIT) * (2 * UNIT); }
inline int64_t packed_size(int64_t vectors, int64_t columns) { return vectors * packed_columns(columns); }

// The columns first .. first + count (a multiple of 2 * UNIT, but at the end of a row) of bf16 vector `index` into a
// panel of `vectors`. x begins at `first`.
void pack(const bf16* x, int64_t first, int64_t count, int64_t columns, int64_t index, int64_t vectors, bf16* panel);

// Rows first .. last of a matrix times a panel of `count` vectors: out[v * out_stride + row - first], where out_stride is
// a multiple of four, and enough for the rows.
void multiply_panel(const Matrix& m, const bf16* panel, int64_t count, int64_t first, int64_t last, float* out,
                    int64_t out_stride);

// Whether this CPU has multiply_panel.
bool has_panels();

}  // namespace lmx
