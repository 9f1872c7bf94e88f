// Vectors in every layout that some matrix of a call asks for.
#pragma once

#include <algorithm>

#include "prepare.h"
#include "scratch.h"

namespace lmx {

class Prepared {
public:
    Prepared(const void* x, Dtype dtype, int64_t count, int64_t columns)
        : x_(x), dtype_(dtype), count_(count), columns_(columns), memory_(LAYOUTS * count * padded(columns)) {}

    // Before the threads start.
    void want(Layout layout) {
        if (made_[layout]) return;
        made_[layout] = true;
        const auto* from = static_cast<const uint8_t*>(x_);
        for (int64_t v = 0; v < count_; ++v)
            prepare(from + v * columns_ * size_of(dtype_), dtype_, columns_, layout, place(layout, v));
    }

    int64_t count() const { return count_; }
    // As many from `v` on as a kernel takes.
    Vectors some(Layout layout, int64_t v, Ahead ahead) {
        return {place(layout, v), std::min<int64_t>(count_ - v, MAX_VECTORS), columns_, padded(columns_), ahead};
    }
    Vectors one(Layout layout, int64_t v, Ahead ahead) {
        return {place(layout, v), 1, columns_, padded(columns_), ahead};
    }

private:
    void* place(Layout layout, int64_t v) {
        return reinterpret_cast<uint8_t*>(memory_.data() + layout * count_ * padded(columns_)) +
               v * padded(columns_) * size_of(layout);
    }
    const void* x_;
    Dtype dtype_;
    int64_t count_, columns_;
    bool made_[LAYOUTS] = {};
    Scratch<float> memory_;
};

}  // namespace lmx
