// The two ends of a step of generation: tokens to their embeddings, logits to the likeliest token.
#include <cmath>
#include <limits>

#include "lanes.h"
#include "scratch.h"

namespace lmx {
namespace {

constexpr int64_t CHUNK = 1 << 14;

const void* at(const void* x, Dtype dtype, int64_t index) {
    return static_cast<const char*>(x) + index * (dtype == F32 ? 4 : 2);
}

// The largest of partial results, NaN before all numbers; ties to the first.
int64_t first_largest(const float* values, int64_t count) {
    int64_t best = 0;
    for (int64_t i = 1; i < count && !std::isnan(values[best]); ++i)
        if (std::isnan(values[i]) || values[i] > values[best]) best = i;
    return best;
}

// As in core/native/pick.py. out[row] = scale * weight[ids[row]], rows of `width`; weight and out of dtype (float or bf16).
// scale 1 copies.
struct Embedding {
    const void* weight;
    const int64_t* ids;
    void* out;
    int64_t rows, width;
    Dtype dtype;
    float scale;
};

}  // namespace
}  // namespace lmx

using namespace lmx;

LMX_EXPORT void lmx_embed(const void* embedding) {
    const auto& e = *static_cast<const Embedding*>(embedding);
    const int64_t bytes = e.width * (e.dtype == F32 ? 4 : 2);
    for (int64_t row = 0; row < e.rows; ++row) {
        const auto* from = static_cast<const char*>(e.weight) + e.ids[row] * bytes;
        auto* to = static_cast<char*>(e.out) + row * bytes;
        std::memcpy(to, from, static_cast<size_t>(bytes));
        for (int64_t i = 0; e.scale != 1.0f && i < e.width; ++i) {
            if (e.dtype == F32) reinterpret_cast<float*>(to)[i] *= e.scale;
            else reinterpret_cast<bf16*>(to)[i] = float_to_bf16(bf16_to_float(reinterpret_cast<bf16*>(to)[i]) * e.scale);
        }
    }
}

// The place of the first largest of `count` logits (float or bf16), or of the first NaN; and, where values stand, that
// logit and the log of the sum of all exponentials, which is NaN or infinite where torch.logsumexp is.
LMX_EXPORT int64_t lmx_pick(const void* logits, int dtype, int64_t count, double* values) {
    const auto kind = static_cast<Dtype>(dtype);
    const int64_t chunks = (count + CHUNK - 1) / CHUNK;
    Scratch<float> largest(chunks), sums(chunks);
    const auto length = [&](int64_t chunk) { return std::min(CHUNK, count - chunk * CHUNK); };
    parallel_for(chunks, 4, [&](int64_t first, int64_t last) {
        for (int64_t c = first; c < last; ++c)
            largest.data()[c] = lanes().largest(at(logits, kind, c * CHUNK), kind, length(c));
    });
    const int64_t chunk = first_largest(largest.data(), chunks);
    const float top = largest.data()[chunk];
    if (values) values[0] = values[1] = top;
    if (values && std::isfinite(top)) {
        parallel_for(chunks, 2, [&](int64_t first, int64_t last) {
            for (int64_t c = first; c < last; ++c)
                sums.data()[c] = lanes().exponentials(at(logits, kind, c * CHUNK), kind, length(c), top);
        });
        double sum = 0;
        for (int64_t c = 0; c < chunks; ++c) sum += sums.data()[c];
        values[1] = top + std::log(sum);
    }
    return chunk * CHUNK + lanes().place(at(logits, kind, chunk * CHUNK), kind, length(chunk), top);
}
