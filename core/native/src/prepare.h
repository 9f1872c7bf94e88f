// Vectors brought into the layout of a kernel, and answers into the dtype that was asked for.
#pragma once

#include "vector.h"

namespace lmx {

// Activations of a gated MLP, by the numbers of core/native/vector.py.
enum Activation : int { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };

// No layout moves an element out of its stretch of so many.
constexpr int64_t STRETCH = 2 * UNIT;

inline int64_t padded(int64_t columns) { return (columns + STRETCH - 1) / STRETCH * STRETCH; }
// Whether two units of a layout are one structure, which takes as much as their floats would.
inline bool is_paired(Layout layout) { return layout == PLAIN_WHOLE || layout == DIGITS; }
inline int64_t size_of(Layout layout) {
    return layout == PLAIN_F32 || layout == SPLIT_F32 || is_paired(layout) ? 4 : 2;
}
inline int64_t size_of(Dtype dtype) { return dtype == F32 ? 4 : 2; }

// Writes `columns` elements of x in a layout, and zeros up to the next whole unit, or two where the layout is quartered or
// paired.
void prepare(const void* x, Dtype dtype, int64_t columns, Layout layout, void* out);

// out[i] = values[i], rounded to dtype.
void store(const float* values, int64_t count, Dtype dtype, void* out);

// gate[i] = activation(gate[i]) * up[i].
void gate_with(float* gate, const float* up, int64_t count, Activation activation);

}  // namespace lmx
