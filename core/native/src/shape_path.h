// From projections to the heads of attention: norm, limit, rotation. The part of attention_path.h that comes before keys are
// met, on the same terms.
#pragma once

#include <cmath>

#include "attention.h"

namespace lmx {
namespace {

#define LMX_FORCE LMX_TARGET inline __attribute__((always_inline))

using Floats = float __attribute__((vector_size(4 * LANES)));
using Words = uint32_t __attribute__((vector_size(4 * LANES)));
using Halves = uint16_t __attribute__((vector_size(2 * LANES)));

// Elements are taken in pairs of vectors. Of bf16 the first vector has the even ones and the second the odd ones, as
// they come out of 32-bit words without a shuffle; queries and answers stand in that order between the calls.
constexpr int64_t PAIR = 2 * LANES;
static_assert(PAIR <= WIDEST_PAIR, "rows of queries and answers are padded to whole pairs");

LMX_FORCE void load(const float* at, Floats& out) { std::memcpy(&out, at, sizeof out); }

LMX_FORCE void load(const bf16* at, Floats& out) {
    Halves halves;
    std::memcpy(&halves, at, sizeof halves);
    const Words words = __builtin_convertvector(halves, Words) << 16;
    std::memcpy(&out, &words, sizeof out);
}

// Where element i of a pair stands; a whole pair put there, and taken back.
LMX_FORCE int64_t place(int64_t i, float) { return i; }
LMX_FORCE int64_t place(int64_t i, bf16) { return i / 2 + (i & 1 ? LANES : 0); }

LMX_FORCE void lay_pair(const float* x, float* out, float) { std::memcpy(out, x, PAIR * sizeof(float)); }
LMX_FORCE void lay_pair(const float* __restrict x, float* __restrict out, bf16) {
    for (int i = 0; i < LANES; ++i) out[i] = x[2 * i], out[LANES + i] = x[2 * i + 1];
}

LMX_FORCE void take_pair(const float* laid, float* out, float) { std::memcpy(out, laid, PAIR * sizeof(float)); }
LMX_FORCE void take_pair(const float* __restrict laid, float* __restrict out, bf16) {
    for (int i = 0; i < LANES; ++i) out[2 * i] = laid[i], out[2 * i + 1] = laid[LANES + i];
}

// The upper half of the lanes onto the lower, until one is left.
template <int COUNT>
LMX_FORCE float sum_of(const float __attribute__((vector_size(4 * COUNT))) & lanes) {
#if defined(LMX_X86)
    if constexpr (COUNT == 16) return _mm512_reduce_add_ps(lanes);
#endif
    if constexpr (COUNT == 4) {
        return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
    } else {
        float __attribute__((vector_size(2 * COUNT))) low, high;
        std::memcpy(&low, &lanes, sizeof low);
        std::memcpy(&high, reinterpret_cast<const char*>(&lanes) + sizeof low, sizeof high);
        low += high;
        return sum_of<COUNT / 2>(low);
    }
}

LMX_FORCE float rounded(float x, float) { return x; }

LMX_FORCE float rounded(float x, bf16) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t up = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    bits = (bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : up;  // without a branch, for the vectoriser
    std::memcpy(&x, &bits, 4);
    return x;
}

LMX_FORCE float value_of(float x) { return x; }
LMX_FORCE float value_of(bf16 x) { return bf16_to_float(x); }

template <typename Stored>
LMX_TARGET float factor(const void* states, int64_t count, float eps) {
    const auto* x = static_cast<const Stored*>(states);
    Floats sums = {}, part;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        load(x + i, part);
        sums += part * part;
    }
    float square = sum_of<LANES>(sums);
    for (; i < count; ++i) square += value_of(x[i]) * value_of(x[i]);
    return 1.0f / std::sqrt(square / static_cast<float>(count) + eps);
}

// Pair (i, i + half) of every head turns by the angle i; channels behind both halves stay.
template <typename Stored>
LMX_TARGET void turn(const Heads& heads, float* x) {
    const float *cos = heads.cos, *sin = heads.sin;
    for (int64_t h = 0; h < heads.count; ++h) {
        float *left = x + h * heads.width, *right = left + heads.half;
        for (int64_t i = 0; i < heads.half; ++i) {
            const float a = left[i], b = right[i];
            left[i] = rounded(a * cos[i] - b * sin[i], Stored{});
            right[i] = rounded(b * cos[i] + a * sin[i], Stored{});
        }
    }
}

template <typename Stored>
LMX_TARGET void shape(const Heads& heads, float* x) {
    const auto *from = static_cast<const Stored*>(heads.states), *scale = static_cast<const Stored*>(heads.norm);
    const int64_t count = heads.count * heads.width;
    for (int64_t i = 0; i < count; ++i) x[i] = value_of(from[i]);
    if (scale)
        for (int64_t i = 0; i < count; ++i)
            x[i] = rounded(value_of(scale[i]) * rounded(x[i] * heads.factor, Stored{}), Stored{});
    if (heads.limit != INFINITY)
        for (int64_t i = 0; i < count; ++i) {  // NaN stays
            const float low = x[i] < -heads.limit ? -heads.limit : x[i];
            x[i] = rounded(low > heads.limit ? heads.limit : low, Stored{});
        }
    if (heads.cos) turn<Stored>(heads, x);
}

template <typename Stored>
LMX_TARGET void lay_out(const float* x, int64_t count, int64_t width, float* out) {
    const int64_t row = padded_width(width), whole = width / PAIR * PAIR;
    for (int64_t h = 0; h < count; ++h, x += width, out += row) {
        for (int64_t d = 0; d < whole; d += PAIR) lay_pair(x + d, out + d, Stored{});
        for (int64_t d = whole; d < row; ++d) out[d / PAIR * PAIR + place(d % PAIR, Stored{})] = d < width ? x[d] : 0;
    }
}

}  // namespace
}  // namespace lmx
