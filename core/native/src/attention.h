// Attention of one new token a row over keys and values in a cache: what the paths for the different CPUs share.
#pragma once

#include "lmx_native.h"

namespace lmx {

// Keys that one thread takes at a time. Its borders lie at fixed slots, and what it finds is combined in the order of
// the slots: results do not depend on the number of threads.
constexpr int64_t CHUNK = 128;
// Query heads that share a key head go through its chunk this many at a time.
constexpr int64_t GROUP = 4;
// The largest score of a chunk and the sum of the weights stand before the weighted sum of its values.
constexpr int64_t PARTIAL_HEAD = 2;
// A head's queries and answers stand in rows of whole pairs of any path's vectors.
constexpr int64_t WIDEST_PAIR = 32;

inline int64_t padded_width(int64_t width) { return (width + WIDEST_PAIR - 1) / WIDEST_PAIR * WIDEST_PAIR; }

// Where a layer's tokens go and what they see, the same for all layers of a call. As `_Step` in core/native/attention.py.
struct Step {
    const float *cos, *sin;  // [rows, half], row_stride apart (0: the same for all rows)
    int64_t half, table_stride;
    const int64_t *slots, *counts;  // [rows]: the slot that takes the new key (-1: none); keys in use, the new one too
    int64_t rows;
};

// A layer's projections of the new tokens, each row `*_stride` elements after the last. As `_Projected`.
struct Projected {
    const void *query, *key, *value;
    int64_t query_stride, key_stride, value_stride;
    const void *query_norm, *key_norm;  // scales of RMS norms over the whole projection, or null
    float query_eps, key_eps;
    float limit;  // all three are kept within [-limit, limit]; infinity for no limit
    int32_t dtype;
    int64_t heads, kv_heads, width;
};

// A layer's keys and values [rows, kv_heads, slots, width], of the projections' dtype. As `_Cache`.
struct Cache {
    void *keys, *values;
    int64_t row_stride, head_stride, slot_stride;
};

// Some heads of one row's projection, and how they are shaped.
struct Heads {
    const void *states, *norm;  // of these heads; norm: scales of an RMS norm over the whole projection, or null
    float factor, limit;        // what the norm multiplies by
    int64_t count, width;
    const float *cos, *sin;  // of `half` angles; null: the heads are not turned
    int64_t half;
};

// What an RMS norm of `count` states multiplies by.
using FactorFunction = float (*)(const void* states, int64_t count, float eps);

// x [count, width] in float, but rounded to dtype wherever torch rounds: normalised, clipped and turned.
using ShapeFunction = void (*)(const Heads& heads, float* x);

// x [count, width] in the order that the path takes queries, zeros behind each: out [count, padded width].
using LayFunction = void (*)(const float* x, int64_t count, int64_t width, float* out);

// out[g] = {max, sum, sum of weighted values [padded width]} of `count` keys for each of `group` queries. next: the keys
// that this thread reads after these, or some that it has read.
using ChunkFunction = void (*)(const float* queries, int64_t group, const void* keys, const void* values, const void* next,
                               int64_t count, int64_t slot_stride, int64_t width, float* out, int64_t out_stride);

// answer [width], from `chunks` partial ones in their own order; sums [padded width] is scratch.
using CombineFunction = void (*)(const float* partials, int64_t chunks, int64_t width, float* sums, float* answer);

struct AttentionPath {
    FactorFunction factor;
    ShapeFunction shape;
    LayFunction lay_out;
    ChunkFunction chunk;
    CombineFunction combine;
};

AttentionPath portable_attention(Dtype dtype);
#if defined(LMX_X86)
AttentionPath avx512_attention(Dtype dtype);
AttentionPath avx2_attention(Dtype dtype);
#elif defined(LMX_NEON)
AttentionPath neon_attention(Dtype dtype);
#endif

}  // namespace lmx
