#include "router.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "scratch.h"

namespace lmx {
namespace {

using Choice = std::pair<float, int64_t>;

// As torch orders: NaN before all numbers. Equal ones compare alike, so that ties fall as the algorithm lets them.
bool larger(const Choice& x, const Choice& y) {
    return (std::isnan(x.first) && !std::isnan(y.first)) || x.first > y.first;
}

// The `top_k` largest to the front, sorted: the very steps of torch.topk on a CPU (aten/src/ATen/native/TopKImpl.h),
// whose choice among equal values is part of the answer.
void take_largest(Choice* choices, int64_t count, int64_t top_k) {
    if (top_k * 64 <= count) {
        std::partial_sort(choices, choices + top_k, choices + count, larger);
        return;
    }
    std::nth_element(choices, choices + top_k - 1, choices + count, larger);
    std::sort(choices, choices + top_k - 1, larger);
}

void softmax(Choice* choices, int64_t count) {
    float largest = choices[0].first, sum = 0;
    for (int64_t i = 0; i < count; ++i)
        if (!(choices[i].first <= largest)) largest = choices[i].first;  // NaN too
    for (int64_t i = 0; i < count; ++i) sum += choices[i].first = std::exp(choices[i].first - largest);
    for (int64_t i = 0; i < count; ++i) choices[i].first /= sum;
}

float norm_of(const Choice* choices, int64_t top_k, int norm) {
    float sum = 0;
    for (int64_t k = 0; k < top_k; ++k) sum += norm == 2 ? choices[k].first * choices[k].first : choices[k].first;
    return norm == 2 ? std::sqrt(sum) : sum;
}

}  // namespace

void route(const void* logits, Dtype dtype, int64_t experts, int64_t top_k, int norm, int64_t* ids, float* weights) {
    Scratch<Choice> memory(experts);
    Choice* choices = memory.data();
    for (int64_t e = 0; e < experts; ++e) {
        const float logit = dtype == F32 ? static_cast<const float*>(logits)[e]
                                         : bf16_to_float(static_cast<const bf16*>(logits)[e]);
        choices[e] = {logit, e};
    }
    softmax(choices, experts);
    take_largest(choices, experts, top_k);
    const float scale = norm ? norm_of(choices, top_k, norm) : 1.0f;
    for (int64_t k = 0; k < top_k; ++k) {
        ids[k] = choices[k].second;
        weights[k] = choices[k].first / scale;
    }
}

}  // namespace lmx

using namespace lmx;

// Of each token: logits [tokens, experts] -> ids, weights [tokens, top_k].
LMX_EXPORT void lmx_route(const void* logits, int dtype, int64_t tokens, int64_t experts, int64_t top_k, int norm,
                          int64_t* ids, float* weights) {
    constexpr int64_t GRAIN = 64;  // tokens that are worth a thread
    const auto type = static_cast<Dtype>(dtype);
    parallel_for(tokens, GRAIN, [&](int64_t first, int64_t last) {
        for (int64_t token = first; token < last; ++token)
            route(static_cast<const uint8_t*>(logits) + token * experts * (type == F32 ? 4 : 2), type, experts, top_k,
                  norm, ids + token * top_k, weights + token * top_k);
    });
}
