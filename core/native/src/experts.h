// A bank of gated MLPs for a few tokens: sum_k weights[t, k] * down_e(activation(gate_e(x_t)) * up_e(x_t)), e = ids[t, k].
#pragma once

#include <algorithm>

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
          activation_(activation), entering_(worth(), 1), leaving_(hidden_, UNIT), between_(slots_ * padded(inner_)) {}

    // How many threads there is work for.
    int64_t worth() const { return slots_ * padded(inner_) / STRETCH; }

    // The layouts that `enter` asks for.
    void prepare_for(const Choices& chosen, Prepared& x) const {
        for (int64_t slot = 0; slot < slots_; ++slot)
            for (int i = 0; i < 2; ++i) x.want(kernel(matrix(chosen, slot, i)).layout);
    }

    // First phase: gate and up, in stretches of their rows. x [tokens, hidden].
    void enter(Share share, const Choices& chosen, Prepared& x);

    // Second phase: calls take(token, row, sums, count) for some rows of the answers at a time.
    template <typename Take>
    void leave(Share share, const Choices& chosen, const Take& take) {
        Scratch<float> sums(hidden_), part(hidden_);
        leaving_.run(share, [&](Share::Range range, bool more) {
            const auto [first, last] = range;
            const int64_t count = last - first;
            const Ahead next = more ? ahead_of(matrix(chosen, 0, 2), last) : Ahead{};
            for (int64_t token = 0, slot = 0; token < chosen.tokens; ++token) {
                std::fill_n(sums.data(), count, 0.0f);
                for (const int64_t end = slot + chosen.top_k; slot < end; ++slot) {
                    const Matrix& down = matrix(chosen, slot, 2);
                    const Ahead ahead = slot + 1 < slots_ ? ahead_of(matrix(chosen, slot + 1, 2), first) : next;
                    const Vectors vector{between_.data() + slot * padded(inner_), 1, inner_, padded(inner_), ahead};
                    kernel(down).rows(down, vector, first, last, part.data(), count);
                    for (int64_t i = 0; i < count; ++i) sums.data()[i] += chosen.weights[slot] * part.data()[i];
                }
                take(token, first, sums.data(), count);
            }
        });
    }

private:
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

    const Expert* bank_;
    const Dtype dtype_;
    const int64_t slots_, hidden_, inner_;
    const Activation activation_;
    Deal entering_, leaving_;
    Scratch<float> between_;  // [slots, inner] in the layout of its expert's `down`
};

}  // namespace lmx
