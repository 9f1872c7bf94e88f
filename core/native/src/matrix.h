// Matrices times many vectors: weights are decoded to bf16 a few rows at a time, right where they are multiplied.
#pragma once

#include "vector.h"

namespace lmx {

// Vectors of one product, copied so that a step through them reads memory in order: for each stretch of DEPTH columns,
// vector after vector; the last stretch is padded with zeros to whole steps of 32.
constexpr int64_t DEPTH = 4096;
constexpr int64_t STEP = 32;
// Vectors that are multiplied by a row before the next row is decoded: as many as stay in the second cache.
constexpr int64_t PANEL = 96;

inline int64_t packed_columns(int64_t columns) { return (columns + STEP - 1) / STEP * STEP; }
inline int64_t packed_size(int64_t vectors, int64_t columns) { return vectors * packed_columns(columns); }

// One vector of dtype into place `index` of `count`.
void pack_vector(const void* x, Dtype dtype, int64_t columns, int64_t index, int64_t count, bf16* packed);

// Rows first .. last (at most UNIT) of a matrix times `count` (at most PANEL) packed vectors:
// out[v * out_stride + row - first].
void multiply_panel(const Matrix& m, const bf16* packed, int64_t count, int64_t first, int64_t last, float* out,
                    int64_t out_stride);

// Whether this CPU has multiply_panel.
bool has_panels();

}  // namespace lmx
