// Attention of one new token a row, from its projections to the heads' answers, the cache written on the way.
#include "attention.h"

#include <algorithm>

#include "prepare.h"
#include "scratch.h"

namespace lmx {
namespace {

// Below so many elements of keys a second thread costs more than it brings.
constexpr int64_t WORTH_A_THREAD = 1 << 16;

AttentionPath choose(Dtype dtype) {
#if defined(LMX_X86)
    if (level() == AVX512) return avx512_attention(dtype);
    if (level() == AVX2) return avx2_attention(dtype);
#elif defined(LMX_NEON)
    if (level() == NEON) return neon_attention(dtype);
#endif
    return portable_attention(dtype);
}

// A layer's heads in float, and the partial answers of all chunks.
struct Work {
    const Step& step;
    const Projected& projected;
    const Cache& cache;
    const AttentionPath path;
    const Dtype dtype;
    const int64_t chunks;  // of the longest row
    const int64_t row_size;
    Scratch<float> memory;

    Work(const Step& step, const Projected& p, const Cache& cache)
        : step(step), projected(p), cache(cache), path(choose(static_cast<Dtype>(p.dtype))),
          dtype(static_cast<Dtype>(p.dtype)), chunks(most_chunks(step)),
          row_size(padded_width(p.width)), memory(step.rows * p.heads * (row_size + chunks * partial_size())) {}

    static int64_t most_chunks(const Step& step) {
        return (*std::max_element(step.counts, step.counts + step.rows) + CHUNK - 1) / CHUNK;
    }
    int64_t partial_size() const { return PARTIAL_HEAD + row_size; }
    float* query(int64_t row, int64_t head) { return memory.data() + (row * projected.heads + head) * row_size; }
    float* partial(int64_t row, int64_t head, int64_t chunk) {
        return query(step.rows, 0) + ((row * projected.heads + head) * chunks + chunk) * partial_size();
    }
    uint8_t* slot(void* buffer, int64_t row, int64_t head, int64_t slot) {
        const int64_t at = row * cache.row_stride + head * cache.head_stride + slot * cache.slot_stride;
        return static_cast<uint8_t*>(buffer) + at * size_of(dtype);
    }
};

// The new tokens' queries into work, their keys and values into the cache.
void begin(Work& work) {
    const Projected& p = work.projected;
    const int64_t narrow = p.kv_heads * p.width;
    Scratch<float> memory(2 * narrow + p.heads * p.width);
    float *key = memory.data(), *value = key + narrow, *query = value + narrow;
    for (int64_t row = 0; row < work.step.rows; ++row) {
        work.path.shape(p, work.step, row, work.query(row, 0), query, key, value);
        const int64_t slot = work.step.slots[row];
        for (int64_t head = 0; head < p.kv_heads && slot >= 0; ++head) {
            store(key + head * p.width, p.width, work.dtype, work.slot(work.cache.keys, row, head, slot));
            store(value + head * p.width, p.width, work.dtype, work.slot(work.cache.values, row, head, slot));
        }
    }
}

// The queries of one key head against one chunk of its keys.
void attend_chunk(Work& work, int64_t row, int64_t kv_head, int64_t chunk) {
    const Projected& p = work.projected;
    const int64_t first = chunk * CHUNK, count = std::min(CHUNK, work.step.counts[row] - first);
    if (count <= 0) return;
    const int64_t group = p.heads / p.kv_heads, head = kv_head * group;
    const void* keys = work.slot(work.cache.keys, row, kv_head, first);
    const void* values = work.slot(work.cache.values, row, kv_head, first);
    work.path.chunk(work.query(row, head), group, keys, values, count, work.cache.slot_stride, p.width,
                    work.partial(row, head, chunk), work.chunks * work.partial_size());
}

void finish_head(Work& work, int64_t row, int64_t head, void* out) {
    const Projected& p = work.projected;
    Scratch<float> answer(p.width);
    const int64_t chunks = (work.step.counts[row] + CHUNK - 1) / CHUNK;
    // The head's query is no longer needed.
    work.path.combine(work.partial(row, head, 0), chunks, p.width, work.query(row, head), answer.data());
    const int64_t at = (row * p.heads + head) * p.width * size_of(work.dtype);
    store(answer.data(), p.width, work.dtype, static_cast<uint8_t*>(out) + at);
}

}  // namespace
}  // namespace lmx

using namespace lmx;

// out [rows, heads * width] of the projections' dtype; `slots` of the cache take the new keys and values.
LMX_EXPORT void lmx_attend_step(const Step* step, const Projected* projected, const Cache* cache, void* out) {
    Work work(*step, *projected, *cache);
    begin(work);
    const int64_t kv_heads = projected->kv_heads, chunks = work.chunks, heads = projected->heads;
    const int64_t grain = std::max<int64_t>(1, WORTH_A_THREAD / (CHUNK * projected->width));
    parallel_for(step->rows * kv_heads * chunks, grain, [&](int64_t first, int64_t last) {
        for (int64_t at = first; at < last; ++at)
            attend_chunk(work, at / chunks / kv_heads, at / chunks % kv_heads, at % chunks);
    });
    const int64_t worth = std::max<int64_t>(1, WORTH_A_THREAD / (chunks * projected->width));
    parallel_for(step->rows * heads, worth, [&](int64_t first, int64_t last) {
        for (int64_t at = first; at < last; ++at) finish_head(work, at / heads, at % heads, out);
    });
}
