// Matrices times many vectors, and banks of experts for a prompt: what Python calls.
//
// Each answer is summed by one thread in an order of its own: results do not depend on how many threads there are.
#include "matrix.h"

#include <algorithm>

#include "prepare.h"
#include "scratch.h"

namespace lmx {
namespace {

// Inputs of experts that are gathered at a time: a bound on what a call needs beside its sums.
constexpr int64_t BATCH = 2048;

// The tokens of one expert, or as many of them as make a panel, by their slots.
struct Group {
    int64_t expert, start, count;
};

// What a thread needs for the answers of a panel to the gate and the up projection.
struct Blocks {
    Kept<float> gate{PANEL * MOST_ROWS}, up{PANEL * STRETCH};
};

Blocks& blocks() {
    static thread_local Blocks mine;
    return mine;
}

// A prompt's way through a bank of experts.
class Bank {
public:
    Bank(const Expert* bank, const bf16* x, int64_t tokens, const int64_t* order, const float* weights,
         int64_t top_k, Activation activation)
        : panels_(*panels()), bank_(bank), x_(x), tokens_(tokens), hidden_(bank[0][0].columns), inner_(bank[0][0].rows), order_(order),
          weights_(weights), top_k_(top_k), activation_(activation), sums_(tokens * hidden_),
          inputs_(packed_size(BATCH, hidden_)), between_(packed_size(BATCH, inner_)) {
        std::memset(sums_.data(), 0, static_cast<size_t>(tokens * hidden_) * sizeof(float));
    }

    // Adds the answers to some groups whose slots follow each other, at most BATCH of them.
    void answer(const Group* groups, int64_t count) {
        const int64_t base = groups[0].start, stretches = (inner_ + STRETCH - 1) / STRETCH;
        parallel_each(count, [&](int64_t g) { gather(groups[g], base); });
        parallel_each(count * stretches,
                      [&](int64_t item) { gate_and_up(groups[item / stretches], base, item % stretches * STRETCH); });
        parallel_each((hidden_ + UNIT - 1) / UNIT, [&](int64_t unit) {
            for (int64_t g = 0; g < count; ++g) down(groups[g], base, unit * UNIT);
        });
    }

    void store_sums(bf16* out) {
        parallel_for(tokens_, 1, [&](int64_t first, int64_t last) {
            store(sums_.data() + first * hidden_, (last - first) * hidden_, BF16, out + first * hidden_);
        });
    }

private:
    bf16* inputs_of(const Group& of, int64_t base) { return inputs_.data() + packed_size(of.start - base, hidden_); }
    bf16* between_of(const Group& of, int64_t base) { return between_.data() + packed_size(of.start - base, inner_); }

    void gather(const Group& of, int64_t base) {
        for (int64_t i = 0; i < of.count; ++i) {
            const bf16* token = x_ + order_[of.start + i] / top_k_ * hidden_;
            panels_.pack(token, 0, hidden_, hidden_, i, of.count, inputs_of(of, base));
        }
    }

    // A stretch of rows of both projections, and the activation.
    void gate_and_up(const Group& of, int64_t base, int64_t row) {
        const int64_t stop = std::min(row + STRETCH, inner_);
        float *gate = blocks().gate.data(), *up = blocks().up.data();
        const auto& [gate_matrix, up_matrix, _] = bank_[of.expert];
        panels_.multiply(gate_matrix, inputs_of(of, base), of.count, row, stop, gate, STRETCH);
        panels_.multiply(up_matrix, inputs_of(of, base), of.count, row, stop, up, STRETCH);
        for (int64_t v = 0; v < of.count; ++v) {
            bf16 inner[STRETCH];
            gate_with(gate + v * STRETCH, up + v * STRETCH, stop - row, activation_);
            store(gate + v * STRETCH, stop - row, BF16, inner);
            panels_.pack(inner, row, stop - row, inner_, v, of.count, between_of(of, base));
        }
    }

    // A unit of rows of the last projection, added to the sums of its tokens.
    void down(const Group& of, int64_t base, int64_t row) {
        const int64_t rows = std::min(UNIT, hidden_ - row);
        float* block = blocks().gate.data();
        panels_.multiply(bank_[of.expert][2], between_of(of, base), of.count, row, row + rows, block, UNIT);
        for (int64_t v = 0; v < of.count; ++v) {
            const int64_t slot = order_[of.start + v];
            float* sum = sums_.data() + slot / top_k_ * hidden_ + row;
            for (int64_t i = 0; i < rows; ++i) sum[i] += weights_[slot] * block[v * UNIT + i];
        }
    }

    const Panels& panels_;
    const Expert* bank_;
    const bf16* x_;
    int64_t tokens_, hidden_, inner_;
    const int64_t* order_;
    const float* weights_;
    int64_t top_k_;
    Activation activation_;
    Scratch<float> sums_;
    Scratch<bf16> inputs_, between_;
};

}  // namespace

const Panels* panels() {
#if defined(LMX_X86)
    if (level() == AMX) return &amx_panels;
    if (level() == AVX512) return &avx512_panels;
#endif
    return nullptr;
}

}  // namespace lmx

using namespace lmx;

LMX_EXPORT int lmx_has_panels() { return panels() != nullptr; }

// out [vectors, rows] = x [vectors, columns], `x_stride` elements apart, times one matrix; both bf16.
LMX_EXPORT void lmx_multiply_many(const Matrix* m, const bf16* x, int64_t x_stride, int64_t vectors, bf16* out) {
    const Panels& by = *panels();
    Scratch<bf16> packed(packed_size(vectors, m->columns));
    const auto panel_at = [&](int64_t start) { return packed.data() + packed_size(start, m->columns); };
    parallel_for(vectors, 1, [&](int64_t first, int64_t last) {
        for (int64_t v = first; v < last; ++v) {
            const int64_t start = v / PANEL * PANEL, count = std::min(PANEL, vectors - start);
            by.pack(x + v * x_stride, 0, m->columns, m->columns, v - start, count, panel_at(start));
        }
    });
    parallel_for(m->rows, UNIT, [&](int64_t first, int64_t last) {
        float* block = blocks().gate.data();
        for (int64_t start = 0; start < vectors; start += PANEL) {
            const int64_t count = std::min(PANEL, vectors - start);
            for (int64_t row = first; row < last; row += by.rows) {
                const int64_t stop = std::min(row + by.rows, last);
                by.multiply(*m, panel_at(start), count, row, stop, block, by.rows);
                for (int64_t v = 0; v < count; ++v)
                    store(block + v * by.rows, stop - row, BF16, out + (start + v) * m->rows + row);
            }
        }
    });
}

// lmx_experts (vector.cpp) for many tokens of bf16, whose slots are sorted by expert: `order` [slots] holds their numbers
// (token * top_k + k), `counts` [experts] how many each expert has. Experts add up in the order of their numbers.
LMX_EXPORT void lmx_experts_many(const Expert* bank, int64_t experts, const bf16* x, int64_t tokens,
                                 const int64_t* order, const int64_t* counts, const float* weights, int64_t top_k,
                                 int activation, bf16* out) {
    Bank prompt(bank, x, tokens, order, weights, top_k, static_cast<Activation>(activation));
    Group groups[BATCH];
    int64_t pending = 0, slots = 0, start = 0;
    for (int64_t e = 0; e < experts; start += counts[e++])
        for (int64_t at = 0; at < counts[e]; at += PANEL) {
            const Group group{e, start + at, std::min(PANEL, counts[e] - at)};
            if (slots + group.count > BATCH) {
                prompt.answer(groups, pending);
                pending = slots = 0;
            }
            groups[pending++] = group;
            slots += group.count;
        }
    if (pending) prompt.answer(groups, pending);
    prompt.store_sums(out);
}
