// One step of a Mamba block (arXiv 2312.00752, figure 3; FalconMamba's norms: arXiv 2410.05355) in one call: norm,
// products, convolution, scan, gate and residual. Every number is rounded where the separate kernels round it.
#include "affine.h"

namespace lmx {
namespace {

// As in core/native/mixer.py. x [rows, hidden] of x_dtype, out of out_dtype; conv_state [rows, inner, kernel - 1] and the
// parameters bfloat16; state [rows, inner, states] and A [inner, states] float. Biases but dt's: or null.
struct MambaStep {
    const void* x;
    void* out;
    const bf16* norm_weight;
    const Matrix *in_proj, *x_proj, *dt_proj, *out_proj;
    const bf16 *in_bias, *dt_bias, *out_bias, *conv_weight, *conv_bias, *D;
    const float* A;
    bf16* conv_state;
    float* state;
    int64_t rows, hidden, inner, states, rank, kernel;
    int32_t x_dtype, out_dtype;
    float norm_eps, mixer_eps;
};

class Mamba {
public:
    explicit Mamba(const MambaStep& s)
        : s_(s), in_(*s.in_proj), x_(*s.x_proj), dt_(*s.dt_proj), out_(*s.out_proj),
          parameters_(s.rank + 2 * s.states), entering_(s.inner, STRETCH), projecting_(parameters_, 16),
          scanning_(s.inner, STRETCH), leaving_(s.hidden, UNIT), both_(s.rows * 2 * s.inner),
          u_(s.rows * s.inner), raw_(s.rows * s.inner), y_(s.rows * s.inner), dbc_(s.rows * parameters_),
          laid_u_(s.rows * x_.bytes()), laid_y_(s.rows * out_.bytes()) {}

    void run() {
        const int64_t worth = in_.weights() / (1 << 16);
        parallel_phases(
            worth, [this](Share share) { enter(share); }, [this](Share share) { parameters(share); },
            [this](Share share) { scan(share); }, [this](Share share) { leave(share); });
    }

private:
    void norm(const void* x, Dtype x_dtype, int64_t x_stride, const bf16* weight, bf16* y, int64_t y_stride,
              int64_t width, float eps) const {
        lanes().norm(Norm{x, weight, y, x_stride, y_stride, width, x_dtype, eps, false}, BF16, 0, s_.rows);
    }

    void enter(Share share) {
        Scratch<bf16> normed(s_.rows * s_.hidden);
        Scratch<uint8_t> laid(s_.rows * in_.bytes());
        norm(s_.x, static_cast<Dtype>(s_.x_dtype), s_.hidden, s_.norm_weight, normed.data(), s_.hidden, s_.hidden,
             s_.norm_eps);
        in_.lay_all(normed.data(), s_.rows, laid.data());
        const auto take = into(s_.in_bias, nullptr, both_.data(), 2 * s_.inner);
        const Ahead next = x_.from(share.of(parameters_, 16).first);
        const Conv conv{both_.data(), s_.conv_weight, s_.conv_bias, s_.conv_state, s_.conv_state, u_.data(), s_.rows,
                        1, s_.inner, s_.kernel, 2 * s_.inner, 1};
        entering_.run(share, [&](Share::Range range, bool more) {
            const auto [first, last] = range;
            in_.multiply(laid.data(), s_.rows, first, last, take, in_.from(s_.inner + first));
            in_.multiply(laid.data(), s_.rows, s_.inner + first, s_.inner + last, take, more ? in_.from(last) : next);
            tiles(range, [&](int64_t from, int64_t to) { lanes().conv(conv, BF16, from, to); });
            x_.lay(u_.data(), s_.rows, first, last, laid_u_.data());
        });
    }

    void parameters(Share share) {
        const auto take = into(nullptr, nullptr, dbc_.data(), parameters_);
        const Ahead next = dt_.from(share.of(s_.inner, STRETCH).first);
        multiply_all(projecting_, share, x_, laid_u_.data(), s_.rows, take, next);
    }

    void scan(Share share) {
        Scratch<bf16> normed(s_.rows * parameters_), dt(s_.rows * s_.rank);
        const bf16* given = dbc_.data();
        norm(given, BF16, parameters_, nullptr, dt.data(), s_.rank, s_.rank, s_.mixer_eps);
        for (int64_t part = 0, at = s_.rank; part < 2; ++part, at += s_.states)
            norm(given + at, BF16, parameters_, nullptr, normed.data() + at, parameters_, s_.states, s_.mixer_eps);
        Scratch<uint8_t> laid(s_.rows * dt_.bytes());
        dt_.lay_all(dt.data(), s_.rows, laid.data());
        const auto take = into(nullptr, nullptr, raw_.data(), s_.inner);
        const bf16 *B = normed.data() + s_.rank, *C = B + s_.states;
        const Scan scan{raw_.data(), s_.dt_bias, u_.data(), both_.data() + s_.inner, B, C, s_.D, s_.A, s_.state,
                        s_.state, y_.data(), nullptr, s_.rows, 1, s_.inner, s_.states, s_.inner, s_.inner,
                        2 * s_.inner, parameters_};
        const Ahead next = out_.from(share.of(s_.hidden, UNIT).first);
        scanning_.run(share, [&](Share::Range range, bool more) {
            const auto [first, last] = range;
            dt_.multiply(laid.data(), s_.rows, first, last, take, more ? dt_.from(last) : next);
            tiles(range, [&](int64_t from, int64_t to) { lanes().scan(scan, BF16, from, to); });
            out_.lay(y_.data(), s_.rows, first, last, laid_y_.data());
        });
    }

    void leave(Share share) {
        const auto x_dtype = static_cast<Dtype>(s_.x_dtype), out_dtype = static_cast<Dtype>(s_.out_dtype);
        const auto take = [&](int64_t v, int64_t row, const float* sums, int64_t count) {
            const int64_t at = v * s_.hidden + row;
            const bf16* bias = s_.out_bias ? s_.out_bias + row : nullptr;
            const auto* stream = static_cast<const uint8_t*>(s_.x) + at * size_of(x_dtype);
            auto* out = static_cast<uint8_t*>(s_.out) + at * size_of(out_dtype);
            lanes().finish(Finish{sums, bias, stream, out, count, x_dtype, out_dtype});
        };
        multiply_all(leaving_, share, out_, laid_y_.data(), s_.rows, take);
    }

    // The tiles of some channels, a row at a time, by the numbers that the kernels have for them.
    template <typename Body>
    void tiles(Share::Range range, const Body& body) const {
        const int64_t all = (s_.inner + CHANNEL_GRAIN - 1) / CHANNEL_GRAIN;
        for (int64_t row = 0; row < s_.rows; ++row)
            body(row * all + range.first / CHANNEL_GRAIN, row * all + (range.last + CHANNEL_GRAIN - 1) / CHANNEL_GRAIN);
    }

    const MambaStep& s_;
    const Product in_, x_, dt_, out_;
    const int64_t parameters_;
    Deal entering_, projecting_, scanning_, leaving_;
    Scratch<bf16> both_, u_, raw_, y_, dbc_;
    Scratch<uint8_t> laid_u_, laid_y_;
};

}  // namespace
}  // namespace lmx

LMX_EXPORT void lmx_mamba_step(const void* step) { lmx::Mamba(*static_cast<const lmx::MambaStep*>(step)).run(); }
