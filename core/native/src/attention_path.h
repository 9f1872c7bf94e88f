// The body of every attention path, in the compilers' generic vectors. Included by one file a path, which says how wide
// its registers are (LANES), how many there are (REGISTERS), and for which CPU to compile (LMX_TARGET). Functions that
// meet vectors must be compiled for that CPU themselves: a template shared by the paths would be lowered to the oldest
// one before it is inlined.
#include <cmath>

#include "attention.h"
#include "exponential.h"

namespace lmx {
namespace {

#define LMX_FORCE LMX_TARGET inline __attribute__((always_inline))

using Floats = float __attribute__((vector_size(4 * LANES)));
using Words = uint32_t __attribute__((vector_size(4 * LANES)));
using Halves = uint16_t __attribute__((vector_size(2 * LANES)));

// Elements of a row are asked for this many bytes ahead: the hardware stops at the border of a page.
constexpr int64_t AHEAD = 2048;

LMX_FORCE void load(const float* at, Floats& out) { std::memcpy(&out, at, sizeof out); }

LMX_FORCE void load(const bf16* at, Floats& out) {
    Halves halves;
    std::memcpy(&halves, at, sizeof halves);
    const Words words = __builtin_convertvector(halves, Words) << 16;
    std::memcpy(&out, &words, sizeof out);
}

// The last elements of a row, zeros behind them.
template <typename Stored>
LMX_FORCE void load_some(const Stored* at, int64_t count, Floats& out) {
    Stored some[LANES] = {};
    std::memcpy(some, at, static_cast<size_t>(count) * sizeof(Stored));
    load(some, out);
}

LMX_FORCE float sum_of(const Floats& lanes) {
    float halves[LANES];
    std::memcpy(halves, &lanes, sizeof halves);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) halves[i] += halves[i + width];
    return halves[0];
}

template <typename Stored>
LMX_FORCE void ask_ahead(const Stored* row, int64_t width) {
    const char* bytes = reinterpret_cast<const char*>(row) + AHEAD;
    for (int64_t at = 0; at < width * static_cast<int64_t>(sizeof(Stored)); at += 64) __builtin_prefetch(bytes + at);
}

// scores[g][j] = queries[g] . keys[j]
template <typename Stored, int COUNT>
LMX_TARGET void score(const float* queries, const Stored* keys, int64_t count, int64_t stride, int64_t width,
                      float (*scores)[CHUNK]) {
    const int64_t whole = width / LANES * LANES;
    for (int64_t j = 0; j < count; ++j) {
        const Stored* key = keys + j * stride;
        ask_ahead(key, width);
        Floats sums[COUNT][2] = {}, part, query;
        int64_t d = 0;
        for (; d + 2 * LANES <= whole; d += 2 * LANES)
            for (int half = 0; half < 2; ++half) {
                load(key + d + half * LANES, part);
                for (int g = 0; g < COUNT; ++g) {
                    load(queries + g * width + d + half * LANES, query);
                    sums[g][half] += part * query;
                }
            }
        for (; d < width; d += LANES) {
            const int64_t some = width - d < LANES ? width - d : LANES;
            load_some(key + d, some, part);
            for (int g = 0; g < COUNT; ++g) {
                load_some(queries + g * width + d, some, query);
                sums[g][0] += part * query;
            }
        }
        for (int g = 0; g < COUNT; ++g) scores[g][j] = sum_of(sums[g][0] + sums[g][1]);
    }
}

// Scores become weights e^(scale * score - max); returns max and the sum of the weights.
LMX_TARGET inline void weigh(float* scores, int64_t count, float scale, float* max, float* sum) {
    float largest = -INFINITY;
    for (int64_t j = 0; j < count; ++j) largest = scores[j] > largest ? scores[j] : largest;
    for (int64_t j = count; j < CHUNK; ++j) scores[j] = -INFINITY;
    largest *= scale;
    for (int64_t j = 0; j < CHUNK; ++j) scores[j] = exponential(scale * scores[j] - largest);
    for (int64_t j = count; j < CHUNK; ++j) scores[j] = 0;
    Floats sums = {}, part;
    for (int64_t j = 0; j < CHUNK; j += LANES) {
        load(scores + j, part);
        sums += part;
    }
    *max = largest;
    *sum = sum_of(sums);
}

// out[g][0 .. VECTORS * LANES) = sum_j weights[g][j] * values[j], from the same columns of every value.
template <typename Stored, int COUNT, int VECTORS>
LMX_TARGET void blend(const float (*weights)[CHUNK], const Stored* values, int64_t count, int64_t stride, float* out,
                      int64_t out_stride, int64_t width_ahead) {
    Floats sums[COUNT][VECTORS] = {}, part;
    for (int64_t j = 0; j < count; ++j) {
        const Stored* value = values + j * stride;
        ask_ahead(value, width_ahead);
        for (int i = 0; i < VECTORS; ++i) {
            load(value + i * LANES, part);
            for (int g = 0; g < COUNT; ++g) sums[g][i] += part * weights[g][j];
        }
    }
    for (int g = 0; g < COUNT; ++g) std::memcpy(out + g * out_stride, sums[g], sizeof sums[g]);
}

template <typename Stored, int COUNT>
LMX_TARGET void blend_all(const float (*weights)[CHUNK], const Stored* values, int64_t count, int64_t stride,
                          int64_t width, float* out, int64_t out_stride) {
    constexpr int VECTORS = COUNT == 1 ? 8 : REGISTERS / 2 / COUNT;
    int64_t d = 0;
    for (; d + VECTORS * LANES <= width; d += VECTORS * LANES)
        blend<Stored, COUNT, VECTORS>(weights, values + d, count, stride, out + d, out_stride, d ? 0 : width);
    for (; d + LANES <= width; d += LANES)
        blend<Stored, COUNT, 1>(weights, values + d, count, stride, out + d, out_stride, 0);
    if (d == width) return;
    Floats sums[COUNT] = {}, part;
    for (int64_t j = 0; j < count; ++j) {
        load_some(values + j * stride + d, width - d, part);
        for (int g = 0; g < COUNT; ++g) sums[g] += part * weights[g][j];
    }
    for (int g = 0; g < COUNT; ++g)
        std::memcpy(out + g * out_stride + d, &sums[g], static_cast<size_t>(width - d) * 4);
}

template <typename Stored, int COUNT>
LMX_TARGET void chunk_of(const float* queries, const Stored* keys, const Stored* values, int64_t count, int64_t stride,
                         int64_t width, float* out, int64_t out_stride) {
    alignas(64) float scores[COUNT][CHUNK];
    score<Stored, COUNT>(queries, keys, count, stride, width, scores);
    const float scale = 1.0f / std::sqrt(static_cast<float>(width));
    for (int g = 0; g < COUNT; ++g)
        weigh(scores[g], count, scale, out + g * out_stride, out + g * out_stride + 1);
    blend_all<Stored, COUNT>(scores, values, count, stride, width, out + PARTIAL_HEAD, out_stride);
}

template <typename Stored>
LMX_TARGET void chunk(const float* queries, int64_t group, const void* keys, const void* values, int64_t count,
                      int64_t stride, int64_t width, float* out, int64_t out_stride) {
    const auto *k = static_cast<const Stored*>(keys), *v = static_cast<const Stored*>(values);
    for (int64_t g = 0; g < group;) {
        const bool several = group - g >= GROUP;
        const auto run = several ? chunk_of<Stored, GROUP> : chunk_of<Stored, 1>;
        run(queries + g * width, k, v, count, stride, width, out + g * out_stride, out_stride);
        g += several ? GROUP : 1;
    }
}

LMX_TARGET void combine(const float* partials, int64_t chunks, int64_t width, float* answer) {
    const int64_t stride = PARTIAL_HEAD + width;
    float largest = -INFINITY, sum = 0;
    for (int64_t c = 0; c < chunks; ++c) largest = partials[c * stride] > largest ? partials[c * stride] : largest;
    for (int64_t d = 0; d < width; ++d) answer[d] = 0;
    for (int64_t c = 0; c < chunks; ++c) {
        const float* partial = partials + c * stride;
        const float weight = exponential(partial[0] - largest);
        sum += weight * partial[1];
        for (int64_t d = 0; d < width; ++d) answer[d] += weight * partial[PARTIAL_HEAD + d];
    }
    const float scale = 1.0f / sum;
    for (int64_t d = 0; d < width; ++d) answer[d] *= scale;
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

// x [count] in float; normalised over all of it if there is a scale, then kept within the limit.
template <typename Stored>
LMX_TARGET void shape_states(const void* states, int64_t count, const void* norm, float eps, float limit, float* x) {
    const auto *from = static_cast<const Stored*>(states), *scale = static_cast<const Stored*>(norm);
    for (int64_t i = 0; i < count; ++i) x[i] = value_of(from[i]);
    if (scale) {
        Floats sums = {}, part;
        int64_t i = 0;
        for (; i + LANES <= count; i += LANES) {
            load(x + i, part);
            sums += part * part;
        }
        float square = sum_of(sums);
        for (; i < count; ++i) square += x[i] * x[i];
        const float factor = 1.0f / std::sqrt(square / static_cast<float>(count) + eps);
        for (i = 0; i < count; ++i)
            x[i] = rounded(value_of(scale[i]) * rounded(x[i] * factor, Stored{}), Stored{});
    }
    if (limit == INFINITY) return;
    for (int64_t i = 0; i < count; ++i) {  // NaN stays
        const float low = x[i] < -limit ? -limit : x[i];
        x[i] = rounded(low > limit ? limit : low, Stored{});
    }
}

// Pair (i, i + half) of every head turns by the angle i; channels behind both halves stay.
template <typename Stored>
LMX_TARGET void turn(float* x, int64_t heads, int64_t width, const float* cos, const float* sin, int64_t half) {
    for (int64_t h = 0; h < heads; ++h) {
        float *left = x + h * width, *right = left + half;
        for (int64_t i = 0; i < half; ++i) {
            const float a = left[i], b = right[i];
            left[i] = rounded(a * cos[i] - b * sin[i], Stored{});
            right[i] = rounded(b * cos[i] + a * sin[i], Stored{});
        }
    }
}

template <typename Stored>
LMX_TARGET void shape(const Projected& p, const Step& step, int64_t row, float* query, float* key, float* value) {
    const auto at = [row](const void* states, int64_t stride) { return static_cast<const Stored*>(states) + row * stride; };
    const int64_t wide = p.heads * p.width, narrow = p.kv_heads * p.width;
    shape_states<Stored>(at(p.query, p.query_stride), wide, p.query_norm, p.query_eps, p.limit, query);
    shape_states<Stored>(at(p.key, p.key_stride), narrow, p.key_norm, p.key_eps, p.limit, key);
    shape_states<Stored>(at(p.value, p.value_stride), narrow, nullptr, 0, p.limit, value);
    const float *cos = step.cos + row * step.table_stride, *sin = step.sin + row * step.table_stride;
    turn<Stored>(query, p.heads, p.width, cos, sin, step.half);
    turn<Stored>(key, p.kv_heads, p.width, cos, sin, step.half);
}

AttentionPath path_of(Dtype dtype) {
    if (dtype == BF16) return {shape<bf16>, chunk<bf16>, combine};
    return {shape<float>, chunk<float>, combine};
}

}  // namespace
}  // namespace lmx
