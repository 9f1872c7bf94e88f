// One layer's attention of one new token a row, in pieces for whichever thread does them.
#pragma once

#include "attention.h"
#include "scratch.h"

namespace lmx {

// The heads in float, and the partial answers of all chunks of keys.
class AttentionWork {
public:
    AttentionWork(const Step& step, const Projected& projected, const Cache& cache);

    // First, in any order: a row's queries are shaped, or its keys and values go into the cache.
    int64_t beginnings() const { return 2 * step_.rows; }
    void begin(int64_t number);
    // Then, in any order: the queries of one key head against one chunk of its keys.
    int64_t pieces() const { return step_.rows * projected_.kv_heads * chunks_; }
    void attend(int64_t piece);
    // Last: a head's answer into out [rows, heads * width].
    int64_t heads() const { return step_.rows * projected_.heads; }
    void finish(int64_t head, void* out);
    // Asks memory for the keys and values of a piece.
    void ask_for(int64_t piece) const;

    // How many pieces, or heads, are worth a thread.
    int64_t pieces_a_thread() const;
    int64_t heads_a_thread() const;

private:
    struct Piece {
        int64_t row, kv_head, chunk, count;
        const uint8_t *keys, *values;
    };
    Piece piece(int64_t number) const;
    uint8_t* slot(void* buffer, int64_t row, int64_t head, int64_t slot) const;
    int64_t partial_size() const { return PARTIAL_HEAD + row_size_; }
    float* query(int64_t row, int64_t head) { return memory_.data() + (row * projected_.heads + head) * row_size_; }
    float* partial(int64_t row, int64_t head, int64_t chunk) {
        return query(step_.rows, 0) + ((row * projected_.heads + head) * chunks_ + chunk) * partial_size();
    }

    const Step& step_;
    const Projected& projected_;
    const Cache& cache_;
    const Dtype dtype_;
    const AttentionPath path_;
    const int64_t chunks_;  // of the longest row
    const int64_t row_size_;
    Scratch<float> memory_;
};

}  // namespace lmx
