// exp and the activations made of it, free of branches, so that a compiler turns a loop over them into vector code for
// the instruction set of the function that they are inlined into.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define LMX_INLINE inline __attribute__((always_inline))
#define LMX_UNROLLED _Pragma("GCC unroll 16")

namespace lmx {

// e^x to about one unit in the last place; below -87 it is 0 or next to it, NaN stays NaN.
LMX_INLINE float exponential(float x) {
    const float clamped = x < -87.3f ? -87.3f : (x > 88.7f ? 88.7f : x);
    const float n = std::nearbyintf(clamped * 1.44269504f);
    const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &p, 4);
    bits += static_cast<int32_t>(n) * (1 << 23);
    std::memcpy(&p, &bits, 4);
    return x > 88.7f ? INFINITY : p;
}

LMX_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

LMX_INLINE float tanh_of(float x) { return 1.0f - 2.0f / (1.0f + exponential(2.0f * x)); }

LMX_INLINE float silu(float x) { return x * sigmoid(x); }

LMX_INLINE float gelu_tanh(float x) {
    return 0.5f * x * (1.0f + tanh_of(0.7978845608f * (x + 0.044715f * x * x * x)));
}

}  // namespace lmx
