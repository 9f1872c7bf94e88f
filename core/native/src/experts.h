// A bank of gated MLPs for a few tokens: sum_k weights[t, k] * down_e(activation(gate_e(x_t)) * up_e(x_t)), e = ids[t, k].
#pragma once

#include <algorithm>
#include <new>

#include "deal.h"
#include "prepared.h"

namespace lmx {

// What was chosen for each token: ids, weights [tokens, top_k].
struct Choices {
    const int64_t* ids;
    const float* weights;
    int64_t tokens, top_k;
};

class ExpertAnswers {
public:
    // dtype: of the activations.
    ExpertAnswers(const Expert* bank, Dtype dtype, int64_t tokens, int64_t top_k, Activation activation)
        : bank_(bank), dtype_(dtype), slots_(tokens * top_k), hidden_(bank[0][0].columns), inner_(bank[0][0].rows),
          blocks_((hidden_ + UNIT - 1) / UNIT), activation_(activation), entering_(worth(), 1),
          leaving_(slots_ * blocks_, 1), between_(slots_ * padded(inner_)), answers_(slots_ * hidden_), left_(tokens * blocks_) {
        for (int64_t i = 0; i < tokens * blocks_; ++i) new (left_.data() + i) std::atomic<int64_t>(top_k);
    }

    // How many threads there is work for.
    int64_t worth() const { return slots_ * padded(inner_) / STRETCH; }

    // The layouts that `enter` asks for.
    void prepare_for(const Choices& chosen, Prepared& x) const {
        for (int64_t slot = 0; slot < slots_; ++slot)
            for (int i = 0; i < 2; ++i) x.want(kernel(matrix(chosen, slot, i)).layout);
    }

    // First phase: gate and up, in stretches of their rows, as many of one matrix at a time as there are: every change of place
    // sets the hardware's own look ahead back. x [tokens, hidden].
    void enter(Share share, const Choices& chosen, Prepared& x);

    // Second phase: each matrix in as few runs as may be, as above. Who is the last at a block of a token's answer adds its
    // slots up, in their order: calls take(token, row, sums, count).
    template <typename Take>
    void leave(Share share, const Choices& chosen, const Take& take) {
        leaving_.run(share, [&](Share::Range range, bool more) {
            for (int64_t at = range.first, next; at < range.last; at = next) {
                const int64_t slot = at / blocks_, row = at % blocks_ * UNIT;
                next = std::min((slot + 1) * blocks_, range.last);
                const int64_t stop = std::min((next - slot * blocks_) * UNIT, hidden_);
                const Matrix& m = matrix(chosen, slot, 2);
                const Vectors vector{between_.data() + slot * padded(inner_), 1, inner_, padded(inner_),
                                     next < range.last || more ? block(chosen, next) : Ahead{}};
                kernel(m).rows(m, vector, row, stop, answers_.data() + slot * hidden_ + row, stop - row);
                const int64_t token = slot / chosen.top_k;
                for (int64_t start = row; start < stop; start += UNIT) {
                    auto& left = left_.data()[token * blocks_ + start / UNIT];
                    if (left.fetch_sub(1, std::memory_order_acq_rel) == 1) add_up(chosen, token, start, take);
                }
            }
        });
    }

private:
    template <typename Take>
    void add_up(const Choices& chosen, int64_t token, int64_t row, const Take& take) {
        const int64_t count = std::min(UNIT, hidden_ - row);
        float sums[UNIT] = {};
        for (int64_t k = 0, slot = token * chosen.top_k; k < chosen.top_k; ++k, ++slot) {
            const float* answer = answers_.data() + slot * hidden_ + row;
            for (int64_t i = 0; i < count; ++i) sums[i] += chosen.weights[slot] * answer[i];
        }
        take(token, row, sums, count);
    }

    void enter(Share::Range stretches, const Choices& chosen, Prepared& x, Ahead then);
    Kernel kernel(const Matrix& m) const { return choose_kernel(m, dtype_); }
    const Matrix& matrix(const Choices& chosen, int64_t slot, int number) const {
        return bank_[chosen.ids[slot]][number];
    }

    // A stretch of gate (0) or up (1), by its number among those of all slots.
    Ahead stretch(const Choices& chosen, int64_t at, int number) const {
        const int64_t stretches = padded(inner_) / STRETCH;
        return ahead_of(matrix(chosen, at / stretches, number), at % stretches * STRETCH);
    }

    // A block of rows of down, by its number among those of all slots.
    Ahead block(const Choices& chosen, int64_t at) const {
        return ahead_of(matrix(chosen, at / blocks_, 2), at % blocks_ * UNIT);
    }

    const Expert* bank_;
    const Dtype dtype_;
    const int64_t slots_, hidden_, inner_, blocks_;
    const Activation activation_;
    Deal entering_, leaving_;
    Scratch<float> between_;  // [slots, inner] in the layout of its expert's `down`
    Scratch<float> answers_;  // [slots, hidden]
    Scratch<std::atomic<int64_t>> left_;  // [tokens, blocks], in slots
};

}  // namespace lmx
