// x + o(attend(q(y), k(y), v(y))), y = norm(x), of one new token a row in one call, the cache written on the way. Every
// number is rounded where the separate kernels round it.
#include "affine.h"
#include "attention_work.h"

namespace lmx {
namespace {

// As in core/native/block.py. x, out [rows, hidden]; `projected` says all of the projections but where they lie.
struct AttentionBlock {
    const bf16* x;
    bf16* out;
    const bf16* norm_weight;
    Affine query, key, value, output;
    const Step* step;
    Projected projected;
    Cache cache;
    int64_t hidden;
    float eps;
    int32_t offset;  // the norm's weight is stored minus one
};

class AttentionBlockStep {
public:
    explicit AttentionBlockStep(const AttentionBlock& s)
        : s_(s), rows_(s.step->rows), wide_(s.query.matrix->rows), narrow_(s.key.matrix->rows),
          total_(wide_ + 2 * narrow_), parts_{Product(*s.query.matrix), Product(*s.key.matrix), Product(*s.value.matrix)},
          output_(*s.output.matrix), projecting_(total_, UNIT), leaving_(s.hidden, UNIT),
          states_(rows_ * total_), answers_(rows_ * wide_), projected_(placed(s.projected)),
          work_(*s.step, projected_, s.cache), attending_(work_.pieces(), 1) {}

    void run() {
        constexpr int64_t WORTH_A_THREAD = 1 << 16;
        parallel_phases(
            total_ * s_.hidden / WORTH_A_THREAD, [this](Share share) { project(share); },
            [this](Share share) { attend(share); }, [this](Share share) { leave(share); });
    }

private:
    // A part's answers stand side by side with the others' of their row.
    Projected placed(Projected p) {
        p.query = states_.data(), p.key = states_.data() + wide_, p.value = states_.data() + wide_ + narrow_;
        p.query_stride = p.key_stride = p.value_stride = total_;
        return p;
    }

    void project(Share share) {
        Normed normed(s_.x, s_.norm_weight, s_.eps, s_.offset, rows_, s_.hidden);
        const bf16* biases[] = {s_.query.bias, s_.key.bias, s_.value.bias};
        Scratch<uint8_t> laid[] = {Scratch<uint8_t>(rows_ * parts_[0].bytes()), Scratch<uint8_t>(rows_ * parts_[1].bytes()),
                                   Scratch<uint8_t>(rows_ * parts_[2].bytes())};
        bool is_laid[3] = {};
        const Ahead output = output_.from(share.of(s_.hidden, UNIT).first);
        projecting_.run(share, [&](Share::Range range, bool more) {
            int64_t before = 0;
            for (int i = 0; i < 3; before += parts_[i++].rows()) {
                const int64_t first = std::max(range.first - before, int64_t{0});
                const int64_t last = std::min(range.last - before, parts_[i].rows());
                if (first >= last) continue;
                const bool ends = range.last <= before + parts_[i].rows();
                const Ahead next = ends ? (more ? from(range.last) : output) : parts_[i + 1].from(0);
                if (!is_laid[i]) normed.lay(parts_[i], laid[i].data());
                is_laid[i] = true;
                const auto take = into(biases[i], nullptr, states_.data() + before, total_);
                parts_[i].multiply(laid[i].data(), rows_, first, last, take, next);
            }
        });
        const Share::Range pieces = share.of(work_.pieces(), 1);
        work_.ask_for(pieces.first, pieces.last);
    }

    // The rows of the three from `row` on.
    Ahead from(int64_t row) const {
        int i = 0;
        while (i < 2 && row >= parts_[i].rows()) row -= parts_[i++].rows();
        return parts_[i].from(row);
    }

    void attend(Share share) {
        Attendant attendant(work_);
        attending_.run(share, [&](Share::Range range, bool more) {
            attendant.attend(range.first, range.last, more, answers_.data());
        });
    }

    void leave(Share share) {
        Scratch<uint8_t> laid(rows_ * output_.bytes());
        output_.lay_all(answers_.data(), rows_, laid.data());
        multiply_all(leaving_, share, output_, laid.data(), rows_, into(s_.output.bias, s_.x, s_.out, s_.hidden));
    }

    const AttentionBlock& s_;
    const int64_t rows_, wide_, narrow_, total_;
    const Product parts_[3], output_;
    Deal projecting_, leaving_;
    Scratch<bf16> states_, answers_;
    const Projected projected_;
    AttentionWork work_;
    Deal attending_;
};

}  // namespace
}  // namespace lmx

LMX_EXPORT void lmx_attention_block(const void* block) {
    lmx::AttentionBlockStep(*static_cast<const lmx::AttentionBlock*>(block)).run();
}
