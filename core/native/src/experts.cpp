// Banks of experts for a few tokens, by themselves or with the norm, the router and the residual around them.
#include "experts.h"

#include "affine.h"
#include "router.h"

namespace lmx {

void ExpertAnswers::enter(Share share, const Choices& chosen, Prepared& x) {
    const Ahead down = block(chosen, share.of(slots_ * blocks_, 1).first);
    entering_.run(share, [&](Share::Range range, bool more) {
        enter(range, chosen, x, more ? stretch(chosen, range.last, 0) : down);
    });
}

void ExpertAnswers::enter(Share::Range range, const Choices& chosen, Prepared& x, Ahead then) {
    const int64_t stretches = padded(inner_) / STRETCH;
    Scratch<float> gate(padded(inner_)), up(padded(inner_));
    for (int64_t at = range.first, next; at < range.last; at = next) {
        const int64_t slot = at / stretches, row = at % stretches * STRETCH;
        next = std::min((slot + 1) * stretches, range.last);
        const int64_t stop = std::min((next - slot * stretches) * STRETCH, inner_), count = stop - row;
        const Ahead aheads[] = {stretch(chosen, at, 1), next < range.last ? stretch(chosen, next, 0) : then};
        float* const sums[] = {gate.data(), up.data()};
        for (int i = 0; i < 2; ++i) {
            const Matrix& m = matrix(chosen, slot, i);
            const Kernel best = kernel(m);
            best.rows(m, x.one(best.layout, slot / chosen.top_k, aheads[i]), row, stop, sums[i], count);
        }
        gate_with(gate.data(), up.data(), count, activation_);
        const Layout layout = kernel(matrix(chosen, slot, 2)).layout;
        auto* vector = reinterpret_cast<uint8_t*>(between_.data() + slot * padded(inner_));
        prepare(gate.data(), F32, count, layout, vector + row * size_of(layout));
    }
}

namespace {

// As in core/native/block.py. out = x + experts(norm(x)), the experts as the router has it; x, out [rows, hidden].
struct ExpertBlock {
    const bf16* x;
    bf16* out;
    const bf16* norm_weight;
    const Matrix* router;
    const Expert* bank;
    int64_t rows, hidden, experts, top_k;
    int32_t routing_norm, activation;
    float eps;
};

class ExpertBlockStep {
public:
    explicit ExpertBlockStep(const ExpertBlock& s)
        : s_(s), router_(*s.router), answers_(s.bank, BF16, s.rows, s.top_k, static_cast<Activation>(s.activation)),
          logits_(s.rows * s.experts), ids_(s.rows * s.top_k), weights_(s.rows * s.top_k) {}

    void run() {
        parallel_phases(
            answers_.worth(), [this](Share share) { route_rows(share); }, [this](Share share) { enter(share); },
            [this](Share share) { leave(share); });
    }

private:
    Normed normed() const { return {s_.x, s_.norm_weight, s_.eps, false, s_.rows, s_.hidden}; }

    void route_rows(Share share) {
        Scratch<uint8_t> laid(s_.rows * router_.bytes());
        normed().lay(router_, laid.data());
        const auto [first, last] = share.of(s_.experts, 16);
        router_.multiply(laid.data(), s_.rows, first, last, into(nullptr, nullptr, logits_.data(), s_.experts));
    }

    // Every thread chooses for itself, which takes no longer than waiting for another one's choice.
    void enter(Share share) {
        Scratch<int64_t> ids(s_.rows * s_.top_k);
        Scratch<float> weights(s_.rows * s_.top_k);
        for (int64_t row = 0; row < s_.rows; ++row)
            route(logits_.data() + row * s_.experts, BF16, s_.experts, s_.top_k, s_.routing_norm,
                  ids.data() + row * s_.top_k, weights.data() + row * s_.top_k);
        if (share.index == 0) {
            std::copy_n(ids.data(), s_.rows * s_.top_k, ids_.data());
            std::copy_n(weights.data(), s_.rows * s_.top_k, weights_.data());
        }
        const Choices chosen{ids.data(), weights.data(), s_.rows, s_.top_k};
        Normed y = normed();
        Prepared prepared(y.data(), BF16, s_.rows, s_.hidden);
        answers_.prepare_for(chosen, prepared);
        answers_.enter(share, chosen, prepared);
    }

    void leave(Share share) {
        const Choices chosen{ids_.data(), weights_.data(), s_.rows, s_.top_k};
        answers_.leave(share, chosen, [this](int64_t token, int64_t row, const float* sums, int64_t count) {
            const int64_t at = token * s_.hidden + row;
            lanes().finish(Finish{sums, nullptr, s_.x + at, s_.out + at, count, BF16, BF16});
        });
    }

    const ExpertBlock& s_;
    const Product router_;
    ExpertAnswers answers_;
    Scratch<bf16> logits_;
    Scratch<int64_t> ids_;
    Scratch<float> weights_;
};

}  // namespace
}  // namespace lmx

using namespace lmx;

// bank: [experts]; x, out [tokens, hidden] of dtype; ids, weights [tokens, top_k].
// Returns 1, and does nothing, where an id is that of no expert.
LMX_EXPORT int lmx_experts(const Expert* bank, int64_t experts, const void* x, int dtype, int64_t tokens,
                           const int64_t* ids, const float* weights, int64_t top_k, int activation, void* out) {
    const auto type = static_cast<Dtype>(dtype);
    for (int64_t slot = 0; slot < tokens * top_k; ++slot)
        if (ids[slot] < 0 || ids[slot] >= experts) return 1;
    const int64_t hidden = bank[0][0].columns;
    const Choices chosen{ids, weights, tokens, top_k};
    ExpertAnswers answers(bank, type, tokens, top_k, static_cast<Activation>(activation));
    Prepared prepared(x, type, tokens, hidden);
    answers.prepare_for(chosen, prepared);
    parallel_phases(
        answers.worth(), [&](Share share) { answers.enter(share, chosen, prepared); },
        [&](Share share) {
            answers.leave(share, chosen, [&](int64_t token, int64_t row, const float* sums, int64_t count) {
                store(sums, count, type, static_cast<uint8_t*>(out) + (token * hidden + row) * size_of(type));
            });
        });
    return 0;
}

LMX_EXPORT void lmx_expert_block(const void* step) { ExpertBlockStep(*static_cast<const ExpertBlock*>(step)).run(); }
