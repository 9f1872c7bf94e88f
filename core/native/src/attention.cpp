// Attention of one new token a row, from its projections to the heads' answers, the cache written on the way.
#include <algorithm>
#include <new>

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
      partials_(step.rows * projected.heads * chunks_ * partial_size()), left_(step.rows * projected.kv_heads) {
    for (int64_t head = 0; head < step.rows * projected.kv_heads; ++head)
        new (left_.data() + head) std::atomic<int64_t>(chunks_of(head / projected.kv_heads));
}

int64_t AttentionWork::pieces_a_thread() const {
    return std::max<int64_t>(1, WORTH_A_THREAD / (CHUNK * projected_.width));
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

void AttentionWork::ask_for(int64_t first, int64_t last) const {
    constexpr int64_t LINE = 64, PAGE = 4096;
    const int64_t room = in_pages() ? 1 << 18 : 1;
    for (int64_t number = first, asked = 0; number < last && asked < room; ++number) {
        const Piece p = piece(number);
        const int64_t bytes = std::max<int64_t>(p.count, 0) * cache_.slot_stride * size_of(dtype_);
        // Pages side by side where that is quicker (Order, vector_avx512.h).
        const int64_t apart = in_pages() ? PAGE : bytes;
        for (int64_t line = 0; line < std::min(apart, bytes); line += LINE)
            for (int64_t at = line; at < bytes; at += apart)
                for (const uint8_t* from : {p.keys, p.values}) __builtin_prefetch(from + at, 0, 2);
        asked += 2 * bytes;
    }
}

Attendant::Attendant(AttentionWork& work)
    : work_(work), factors_(2 * work.step_.rows), queries_(work.group() * work.row_size_),
      states_((work.group() + 1) * work.row_size_) {
    const Projected& p = work.projected_;
    for (int64_t row = 0; row < work.step_.rows; ++row) {
        float* factors = factors_.data() + 2 * row;
        const auto of = [&](const void* states, int64_t stride, int64_t heads, const void* norm, float eps) {
            const auto* from = static_cast<const uint8_t*>(states) + row * stride * size_of(work.dtype_);
            return norm ? work.path_.factor(from, heads * p.width, eps) : 1.0f;
        };
        factors[0] = of(p.query, p.query_stride, p.heads, p.query_norm, p.query_eps);
        factors[1] = of(p.key, p.key_stride, p.kv_heads, p.key_norm, p.key_eps);
    }
}

void Attendant::attend(int64_t first, int64_t last, bool more, void* out) {
    const int64_t end = more ? last : last - 1;
    for (int64_t number = first; number < last; ++number) attend_piece(number, std::min(number + 1, end), out);
}

void Attendant::attend_piece(int64_t number, int64_t next, void* out) {
    const auto [row, kv_head, chunk, count, keys, values] = work_.piece(number);
    if (count <= 0) return;
    take_queries(row, kv_head);
    const int64_t into = work_.step_.slots[row];
    if (into >= 0 && std::min(into / CHUNK, work_.chunks_of(row) - 1) == chunk) write(row, kv_head);
    work_.path_.chunk(queries_.data(), work_.group(), keys, values, work_.piece(next).keys, count, work_.cache_.slot_stride,
                      work_.projected_.width, work_.partial(row, kv_head * work_.group(), chunk),
                      work_.chunks_ * work_.partial_size());
    auto& left = work_.left_.data()[row * work_.projected_.kv_heads + kv_head];
    if (left.fetch_sub(1, std::memory_order_acq_rel) == 1) finish(row, kv_head, out);
}

Heads Attendant::heads(const void* states, int64_t stride, const void* norm, float factor, int64_t row, int64_t first,
                       int64_t count) const {
    const int64_t size = size_of(work_.dtype_), width = work_.projected_.width, angles = row * work_.step_.table_stride;
    const auto* scales = static_cast<const uint8_t*>(norm);
    return {static_cast<const uint8_t*>(states) + (row * stride + first * width) * size,
            scales ? scales + first * width * size : nullptr,
            factor,
            work_.projected_.limit,
            count,
            width,
            work_.step_.cos + angles,
            work_.step_.sin + angles,
            work_.step_.half};
}

void Attendant::take_queries(int64_t row, int64_t kv_head) {
    const Projected& p = work_.projected_;
    if (at_ == row * p.kv_heads + kv_head) return;
    at_ = row * p.kv_heads + kv_head;
    const int64_t group = work_.group();
    const float factor = factors_.data()[2 * row];
    work_.path_.shape(heads(p.query, p.query_stride, p.query_norm, factor, row, kv_head * group, group), states_.data());
    work_.path_.lay_out(states_.data(), group, p.width, queries_.data());
}

void Attendant::write(int64_t row, int64_t kv_head) {
    const Projected& p = work_.projected_;
    const int64_t into = work_.step_.slots[row];
    const auto put = [&](const Heads& head, void* buffer) {
        work_.path_.shape(head, states_.data());
        store(states_.data(), p.width, work_.dtype_, work_.slot(buffer, row, kv_head, into));
    };
    put(heads(p.key, p.key_stride, p.key_norm, factors_.data()[2 * row + 1], row, kv_head, 1), work_.cache_.keys);
    Heads value = heads(p.value, p.value_stride, nullptr, 1, row, kv_head, 1);
    value.cos = nullptr;
    put(value, work_.cache_.values);
}

void Attendant::finish(int64_t row, int64_t kv_head, void* out) {
    const int64_t width = work_.projected_.width, first = kv_head * work_.group();
    float *sums = states_.data(), *answer = sums + work_.row_size_;
    for (int64_t head = first; head < first + work_.group(); ++head) {
        work_.path_.combine(work_.partial(row, head, 0), work_.chunks_of(row), width, sums, answer);
        const int64_t at = (row * work_.projected_.heads + head) * width;
        store(answer, width, work_.dtype_, static_cast<uint8_t*>(out) + at * size_of(work_.dtype_));
    }
}

}  // namespace lmx

using namespace lmx;

// out [rows, heads * width] of the projections' dtype; `slots` of the cache take the new keys and values.
LMX_EXPORT void lmx_attend_step(const Step* step, const Projected* projected, const Cache* cache, void* out) {
    AttentionWork work(*step, *projected, *cache);
    parallel_for(work.pieces(), work.pieces_a_thread(), [&](int64_t first, int64_t last) {
        Attendant attendant(work);
        attendant.attend(first, last, false, out);
    });
}
