// The router of a mixture of experts: softmax, the largest probabilities, their norm.
#pragma once

#include "lmx_native.h"

namespace lmx {

// logits [experts] of dtype (float or bf16) -> ids, weights [top_k], the likeliest expert first.
// norm: weights are divided by their 1-norm or 2-norm; 0 leaves them.
void route(const void* logits, Dtype dtype, int64_t experts, int64_t top_k, int norm, int64_t* ids, float* weights);

}  // namespace lmx
