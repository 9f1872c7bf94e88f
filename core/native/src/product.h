// One matrix in the middle of a fused step: its vectors are laid out, and its rows multiplied, by whoever has them to do.
#pragma once

#include <algorithm>

#include "prepare.h"
#include "vector.h"

namespace lmx {

class Product {
public:
    explicit Product(const Matrix& m) : m_(m), kernel_(choose_kernel(m, BF16)) {}

    int64_t rows() const { return m_.rows; }
    int64_t weights() const { return m_.rows * m_.columns; }
    // Of one vector as its kernel wants it.
    int64_t bytes() const { return padded(m_.columns) * size_of(kernel_.layout); }

    // Lays out the elements first .. last of vectors x [count, columns], `first` and `last` at borders of a STRETCH.
    void lay(const bf16* x, int64_t count, int64_t first, int64_t last, uint8_t* laid) const {
        const int64_t stop = std::min(last, m_.columns);
        if (first >= stop) return;
        for (int64_t v = 0; v < count; ++v)
            prepare(x + v * m_.columns + first, BF16, stop - first, kernel_.layout,
                    laid + v * bytes() + first * size_of(kernel_.layout));
    }
    void lay_all(const bf16* x, int64_t count, uint8_t* laid) const { lay(x, count, 0, m_.columns, laid); }

    // The rows from `row` on, for the product before this one.
    Ahead from(int64_t row) const { return row < m_.rows ? ahead_of(m_, row) : Ahead{}; }

    // Multiplies the rows first .. last: calls take(vector, row, sums, count) for some rows of each vector at a time.
    // then: what this thread reads next.
    template <typename Take>
    void multiply(const uint8_t* laid, int64_t count, int64_t first, int64_t last, const Take& take, Ahead then = {}) const {
        Vectors vectors{laid, count, m_.columns, padded(m_.columns)};
        float sums[MAX_VECTORS * UNIT];
        for (int64_t row = first; row < last; row += UNIT) {
            const int64_t stop = std::min(row + UNIT, last);
            vectors.ahead = stop < last ? ahead_of(m_, stop) : then;
            kernel_.rows(m_, vectors, row, stop, sums, UNIT);
            for (int64_t v = 0; v < count; ++v) take(v, row, sums + v * UNIT, stop - row);
        }
    }

private:
    const Matrix& m_;
    Kernel kernel_;
};

}  // namespace lmx
