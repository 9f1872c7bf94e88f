// One step of Griffin's blocks (arXiv 2402.19427, figure 2): the recurrent one with its MLP in one call, and the MLP of the
// attention layers by itself. Every number is rounded where the separate kernels round it.
#include "affine.h"

namespace lmx {
namespace {

// The structures of core/native/griffin.py; all 16-bit floats are bfloat16.
// x + down(activation(gate(norm(x))) * up(norm(x))) of x and out [rows, hidden].
struct MlpStep {
    const bf16* x;
    bf16* out;
    const bf16* norm_weight;
    Affine gate, up, down;
    int64_t rows, hidden, inner;
    int32_t activation;
    float eps;
};

// x + linear_out(rg_lru(conv(linear_x(norm(x)))) * activation(linear_y(norm(x)))), and the MLP behind it, whose x and out
// are not looked at. conv_state [rows, width, kernel - 1]; state [rows, width] and rate [width] float.
struct GriffinStep {
    const bf16* x;
    bf16* out;
    const bf16* norm_weight;
    Affine linear_y, linear_x, linear_out;
    const bf16 *conv_weight, *conv_bias, *input_weight, *input_bias, *recurrent_weight, *recurrent_bias;
    const float* rate;
    const uint8_t* reset;
    bf16* conv_state;
    float* state;
    int64_t width, heads, kernel, reset_stride;
    int32_t activation;
    float eps;
    MlpStep mlp;
};

constexpr int64_t WORTH_A_THREAD = 1 << 16;

class Mlp {
public:
    explicit Mlp(const MlpStep& s)
        : s_(s), gate_(*s.gate.matrix), up_(*s.up.matrix), down_(*s.down.matrix),
          entering_(s.inner, STRETCH), leaving_(s.hidden, UNIT), gated_(s.rows * s.inner),
          up_answers_(s.rows * s.inner), laid_(s.rows * down_.bytes()) {}

    int64_t worth() const { return (gate_.weights() + up_.weights()) / WORTH_A_THREAD; }

    // Gate and up, of many rows each in one go: every change of place sets the hardware's own look ahead back.
    void enter(Share share, const bf16* x) {
        Scratch<uint8_t> for_gate(s_.rows * gate_.bytes()), for_up(s_.rows * up_.bytes());
        Normed normed(x, s_.norm_weight, s_.eps, true, s_.rows, s_.hidden);
        normed.lay(gate_, for_gate.data());
        normed.lay(up_, for_up.data());
        const Ahead down = down_.from(share.of(s_.hidden, UNIT).first);
        const auto to_gate = into(s_.gate.bias, nullptr, gated_.data(), s_.inner);
        const auto to_up = into(s_.up.bias, nullptr, up_answers_.data(), s_.inner);
        entering_.run(share, [&](Share::Range range, bool more) {
            const auto [first, last] = range;
            const Ahead next = more ? gate_.from(last) : down;
            gate_.multiply(for_gate.data(), s_.rows, first, last, to_gate, up_.from(first));
            up_.multiply(for_up.data(), s_.rows, first, last, to_up, next);
            for (int64_t v = 0; v < s_.rows; ++v) {
                bf16* gate = gated_.data() + v * s_.inner + first;
                const bf16* up = up_answers_.data() + v * s_.inner + first;
                lanes().gate(Gate{gate, up, gate, last - first, s_.activation});
            }
            down_.lay(gated_.data(), s_.rows, first, last, laid_.data());
        });
    }

    // What a thread reads first.
    Ahead begin(Share share) const { return gate_.from(share.of(s_.inner, STRETCH).first); }

    void leave(Share share, const bf16* x, bf16* out) {
        multiply_all(leaving_, share, down_, laid_.data(), s_.rows, into(s_.down.bias, x, out, s_.hidden));
    }

private:
    const MlpStep& s_;
    const Product gate_, up_, down_;
    Deal entering_, leaving_;
    Scratch<bf16> gated_, up_answers_;
    Scratch<uint8_t> laid_;
};

class Griffin {
public:
    explicit Griffin(const GriffinStep& s)
        : s_(s), rows_(s.mlp.rows), hidden_(s.mlp.hidden), tiles_(s.heads * tiles_of(s.width / s.heads)),
          entering_(s.width, STRETCH), recurring_(tiles_, 1), leaving_(hidden_, UNIT),
          y_(*s.linear_y.matrix), x_(*s.linear_x.matrix), out_(*s.linear_out.matrix), mlp_(s.mlp),
          gate_(rows_ * s.width), branch_(rows_ * s.width), u_(rows_ * s.width), answers_(rows_ * s.width),
          between_(rows_ * hidden_) {}

    void run() {
        parallel_phases(
            mlp_.worth(), [this](Share share) { enter(share); }, [this](Share share) { recur(share); },
            [this](Share share) { leave(share); }, [this](Share share) { mlp_.enter(share, between_.data()); },
            [this](Share share) { mlp_.leave(share, between_.data(), s_.out); });
    }

private:
    static int64_t tiles_of(int64_t width) { return (width + RECURRENCE_TILE - 1) / RECURRENCE_TILE; }

    // Both branches up to the convolution, each channel on one thread.
    void enter(Share share) {
        Scratch<uint8_t> for_y(rows_ * y_.bytes()), for_x(rows_ * x_.bytes());
        Normed normed(s_.x, s_.norm_weight, s_.eps, true, rows_, hidden_);
        normed.lay(y_, for_y.data());
        normed.lay(x_, for_x.data());
        const Ahead out = out_.from(share.of(hidden_, UNIT).first);
        const auto to_gate = into(s_.linear_y.bias, nullptr, gate_.data(), s_.width);
        const auto to_branch = into(s_.linear_x.bias, nullptr, branch_.data(), s_.width);
        const Conv conv{branch_.data(), s_.conv_weight, s_.conv_bias, s_.conv_state, s_.conv_state, u_.data(), rows_,
                        1, s_.width, s_.kernel, s_.width, 0};
        const int64_t all = (s_.width + CHANNEL_GRAIN - 1) / CHANNEL_GRAIN;
        entering_.run(share, [&](Share::Range range, bool more) {
            const auto [first, last] = range;
            const Ahead next = more ? y_.from(last) : out;
            y_.multiply(for_y.data(), rows_, first, last, to_gate, x_.from(first));
            x_.multiply(for_x.data(), rows_, first, last, to_branch, next);
            for (int64_t v = 0; v < rows_; ++v) {
                bf16* gate = gate_.data() + v * s_.width + first;
                lanes().gate(Gate{gate, nullptr, gate, last - first, s_.activation});
                lanes().conv(conv, BF16, v * all + first / CHANNEL_GRAIN, v * all + (last + CHANNEL_GRAIN - 1) / CHANNEL_GRAIN);
            }
        });
    }

    void recur(Share share) {
        const Recurrence step{u_.data(), nullptr, nullptr, gate_.data(), s_.input_weight, s_.input_bias,
                              s_.recurrent_weight, s_.recurrent_bias, s_.rate, s_.state, s_.reset, s_.state,
                              answers_.data(), nullptr, rows_, 1, s_.heads, s_.width / s_.heads, s_.width, s_.width,
                              s_.reset_stride};
        recurring_.run(share, [&](Share::Range range, bool) {
            for (int64_t v = 0; v < rows_; ++v)
                lanes().recurrence(step, BF16, v * tiles_ + range.first, v * tiles_ + range.last);
        });
    }

    // A head's answers may end within a stretch, so every thread lays out all of them.
    void leave(Share share) {
        Scratch<uint8_t> laid(rows_ * out_.bytes());
        out_.lay_all(answers_.data(), rows_, laid.data());
        const auto take = into(s_.linear_out.bias, s_.x, between_.data(), hidden_);
        multiply_all(leaving_, share, out_, laid.data(), rows_, take, mlp_.begin(share));
    }

    const GriffinStep& s_;
    const int64_t rows_, hidden_, tiles_;
    Deal entering_, recurring_, leaving_;
    const Product y_, x_, out_;
    Mlp mlp_;
    Scratch<bf16> gate_, branch_, u_, answers_, between_;
};

}  // namespace
}  // namespace lmx

using namespace lmx;

LMX_EXPORT void lmx_griffin_step(const void* step) { Griffin(*static_cast<const GriffinStep*>(step)).run(); }

LMX_EXPORT void lmx_mlp_step(const void* step) {
    const auto& s = *static_cast<const MlpStep*>(step);
    Mlp mlp(s);
    parallel_phases(
        mlp.worth(), [&](Share share) { mlp.enter(share, s.x); }, [&](Share share) { mlp.leave(share, s.x, s.out); });
}

// x[i] = cap tanh(x[i] / cap), in place.
LMX_EXPORT void lmx_soft_cap(bf16* x, int64_t count, float cap) {
    parallel_for(count, 1 << 14, [&](int64_t first, int64_t last) { lanes().soft_cap(x + first, last - first, cap); });
}
