// Attention of one new token a row, from its projections to the heads' answers, the cache written on the way.
#include <algorithm>

#include "attention_work.h"
#include "prepare.h"

namespace lmx {
namespace {

// Below so many elements of keys a second thread costs more than it brings.
constexpr int64_t WORTH_A_THREAD = 1 << 16;

AttentionPath choose(Dtype dtype) {
#if defined(LMX_X86)
    if (has_avx512()) return avx512_attention(dtype);
    if (level() == AVX2) return avx2_attention(dtype);
#elif defined(LMX_NEON)
    if (level() == NEON) return neon_attention(dtype);
#endif
    return portable_attention(dtype);
}

int64_t most_chunks(const Step& step) {
    return (*std::max_element(step.counts, step.counts + step.rows) + CHUNK - 1) / CHUNK;
}

}  // namespace

AttentionWork::AttentionWork(const Step& step, const Projected& projected, const Cache& cache)
    : step_(step), projected_(projected), cache_(cache), dtype_(static_cast<Dtype>(projected.dtype)),
      path_(choose(dtype_)), chunks_(most_chunks(step)), row_size_(padded_width(projected.width)),
      memory_(step.rows * projected.heads * (row_size_ + chunks_ * partial_size())) {}

int64_t AttentionWork::pieces_a_thread() const {
    return std::max<int64_t>(1, WORTH_A_THREAD / (CHUNK * projected_.width));
}

int64_t AttentionWork::heads_a_thread() const {
    return std::max<int64_t>(1, WORTH_A_THREAD / (chunks_ * projected_.width));
}

uint8_t* AttentionWork::slot(void* buffer, int64_t row, int64_t head, int64_t slot) const {
    const int64_t at = row * cache_.row_stride + head * cache_.head_stride + slot * cache_.slot_stride;
    return static_cast<uint8_t*>(buffer) + at * size_of(dtype_);
}

AttentionWork::Piece AttentionWork::piece(int64_t number) const {
    const int64_t row = number / chunks_ / projected_.kv_heads, kv_head = number / chunks_ % projected_.kv_heads;
    const int64_t chunk = number % chunks_, first = chunk * CHUNK;
    return {row, kv_head, chunk, std::min(CHUNK, step_.counts[row] - first), slot(cache_.keys, row, kv_head, first),
            slot(cache_.values, row, kv_head, first)};
}

void AttentionWork::begin(int64_t number) {
    const Projected& p = projected_;
    const int64_t row = number / 2, narrow = p.kv_heads * p.width, into = step_.slots[row];
    if (number % 2 == 0) {
        Scratch<float> memory(p.heads * p.width);
        path_.shape_queries(p, step_, row, query(row, 0), memory.data());
        return;
    }
    if (into < 0) return;
    Scratch<float> memory(2 * narrow);
    float *key = memory.data(), *value = key + narrow;
    path_.shape_keys(p, step_, row, key, value);
    for (int64_t head = 0; head < p.kv_heads; ++head) {
        store(key + head * p.width, p.width, dtype_, slot(cache_.keys, row, head, into));
        store(value + head * p.width, p.width, dtype_, slot(cache_.values, row, head, into));
    }
}

void AttentionWork::attend(int64_t number) {
    const Projected& p = projected_;
    const auto [row, kv_head, chunk, count, keys, values] = piece(number);
    if (count <= 0) return;
    const int64_t group = p.heads / p.kv_heads, head = kv_head * group;
    path_.chunk(query(row, head), group, keys, values, count, cache_.slot_stride, p.width, partial(row, head, chunk),
                chunks_ * partial_size());
}

void AttentionWork::ask_for(int64_t number) const {
    constexpr int64_t LINE = 64;
    const Piece p = piece(number);
    const int64_t bytes = p.count * cache_.slot_stride * size_of(dtype_);
    for (const uint8_t* from : {p.keys, p.values})
        for (int64_t at = 0; at < bytes; at += LINE) __builtin_prefetch(from + at, 0, 2);
}

void AttentionWork::finish(int64_t number, void* out) {
    const Projected& p = projected_;
    const int64_t row = number / p.heads, head = number % p.heads;
    Scratch<float> answer(p.width);
    const int64_t chunks = (step_.counts[row] + CHUNK - 1) / CHUNK;
    // The head's query is no longer needed.
    path_.combine(partial(row, head, 0), chunks, p.width, query(row, head), answer.data());
    store(answer.data(), p.width, dtype_, static_cast<uint8_t*>(out) + number * p.width * size_of(dtype_));
}

}  // namespace lmx

using namespace lmx;

// out [rows, heads * width] of the projections' dtype; `slots` of the cache take the new keys and values.
LMX_EXPORT void lmx_attend_step(const Step* step, const Projected* projected, const Cache* cache, void* out) {
    AttentionWork work(*step, *projected, *cache);
    for (int64_t number = 0; number < work.beginnings(); ++number) work.begin(number);
    parallel_for(work.pieces(), work.pieces_a_thread(), [&](int64_t first, int64_t last) {
        for (int64_t piece = first; piece < last; ++piece) work.attend(piece);
    });
    parallel_for(work.heads(), work.heads_a_thread(), [&](int64_t first, int64_t last) {
        for (int64_t head = first; head < last; ++head) work.finish(head, out);
    });
}
