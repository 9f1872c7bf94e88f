// One layer's attention of one new token a row, in pieces for whichever thread does them.
#pragma once

#include <atomic>

#include "attention.h"
#include "scratch.h"

namespace lmx {

// What the threads share: the partial answers of all chunks of keys, and how many of a head's are still to come.
class AttentionWork {
public:
    AttentionWork(const Step& step, const Projected& projected, const Cache& cache);

    // The queries of one key head against one chunk of its keys; in any order.
    int64_t pieces() const { return step_.rows * projected_.kv_heads * chunks_; }
    // How many are worth a thread.
    int64_t pieces_a_thread() const;
    // Asks memory for the keys and values of the first of these pieces, or, where attention asks for whole pieces ahead, of as
    // many as have room in a core's second cache.
    void ask_for(int64_t first, int64_t last) const;

private:
    friend class Attendant;
    struct Piece {
        int64_t row, kv_head, chunk, count;
        const uint8_t *keys, *values;
    };
    Piece piece(int64_t number) const;
    int64_t chunks_of(int64_t row) const { return (step_.counts[row] + CHUNK - 1) / CHUNK; }
    uint8_t* slot(void* buffer, int64_t row, int64_t head, int64_t slot) const;
    int64_t group() const { return projected_.heads / projected_.kv_heads; }
    int64_t partial_size() const { return PARTIAL_HEAD + row_size_; }
    float* partial(int64_t row, int64_t head, int64_t chunk) {
        return partials_.data() + ((row * projected_.heads + head) * chunks_ + chunk) * partial_size();
    }

    const Step& step_;
    const Projected& projected_;
    const Cache& cache_;
    const Dtype dtype_;
    const AttentionPath path_;
    const int64_t chunks_;  // of the longest row
    const int64_t row_size_;
    Scratch<float> partials_;
    Scratch<std::atomic<int64_t>> left_;  // [rows, kv_heads], in chunks
};

// One of the threads. It shapes the queries that it needs by itself, which takes less than waiting for somebody else's.
class Attendant {
public:
    explicit Attendant(AttentionWork& work);

    // Does the pieces first .. last. Who has the chunk that the new key belongs to puts it there first; who is the last at a
    // head combines its chunks, in their order, into out [rows, heads, width]. more: this thread goes on with piece `last`.
    void attend(int64_t first, int64_t last, bool more, void* out);

private:
    void attend_piece(int64_t number, int64_t next, void* out);
    Heads heads(const void* states, int64_t stride, const void* norm, float factor, int64_t row, int64_t first,
                int64_t count) const;
    void take_queries(int64_t row, int64_t kv_head);
    void write(int64_t row, int64_t kv_head);
    void finish(int64_t row, int64_t kv_head, void* out);

    AttentionWork& work_;
    int64_t at_ = -1;  // the head of keys whose queries these are
    Scratch<float> factors_, queries_, states_;
};

}  // namespace lmx
