// A linear layer in the middle of a fused step, and the rows that it takes.
#pragma once

#include "deal.h"
#include "lanes.h"
#include "product.h"
#include "scratch.h"

namespace lmx {

// A matrix and its bias, or null. As `_Affine` in core/native/mixer.py.
struct Affine {
    const Matrix* matrix;
    const bf16* bias;
};

// Rows x [rows, hidden] normalised and laid out for products by matrices that share them, once for every thread.
class Normed {
public:
    Normed(const bf16* x, const bf16* weight, float eps, bool offset, int64_t rows, int64_t hidden)
        : rows_(rows), y_(rows * hidden) {
        lanes().norm(Norm{x, weight, y_.data(), hidden, hidden, hidden, BF16, eps, offset}, BF16, 0, rows);
    }
    const bf16* data() { return y_.data(); }
    void lay(const Product& product, uint8_t* laid) { product.lay_all(y_.data(), rows_, laid); }

private:
    int64_t rows_;
    Scratch<bf16> y_;
};

// Takes sums: out [rows, stride] = they and the bias, and the stream [rows, stride], if any.
inline auto into(const bf16* bias, const bf16* stream, bf16* out, int64_t stride) {
    return [=](int64_t v, int64_t row, const float* sums, int64_t count) {
        const int64_t at = v * stride + row;
        lanes().finish(Finish{sums, bias ? bias + row : nullptr, stream ? stream + at : nullptr, out + at, count, BF16, BF16});
    };
}

// All rows of a product, by whichever thread takes them. then: what this one reads next.
template <typename Take>
void multiply_all(Deal& deal, Share share, const Product& product, const uint8_t* laid, int64_t count, const Take& take,
                  Ahead then = {}) {
    deal.run(share, [&](Share::Range range, bool more) {
        product.multiply(laid, count, range.first, range.last, take, more ? product.from(range.last) : then);
    });
}

}  // namespace lmx
