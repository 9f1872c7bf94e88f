// Matrices times many vectors, and banks of experts for a prompt: what Python calls.
//
// Each answer is summed by one thread in an order of its own: results do not depend on how many threads there are.
#include "matrix.h"

#include <algorithm>

#include "prepare.h"
#include "scratch.h"

namespace lmx {

void pack_vector(const void* x, Dtype dtype, int64_t columns, int64_t index, int64_t count, bf16* packed) {
    const auto* from = static_cast<const uint8_t*>(x);
    for (int64_t c = 0; c < columns; c += DEPTH) {
        const int64_t length = std::min(DEPTH, columns - c), depth = packed_columns(length);
        bf16* to = packed + c * count + index * depth;
        if (dtype == BF16) {
            std::memcpy(to, from + 2 * c, static_cast<size_t>(length) * 2);
        } else {
            alignas(64) bf16 whole[DEPTH + STRETCH];
            prepare(from + c * size_of(dtype), dtype, length, PLAIN_BF16, whole);
            std::memcpy(to, whole, static_cast<size_t>(length) * 2);
        }
        std::memset(to + length, 0, static_cast<size_t>(depth - length) * 2);
    }
}

namespace {

// Vectors in panels, each packed for itself.
class Panels {
public:
    Panels(int64_t count, int64_t columns) : count_(count), columns_(columns), memory_(packed_size(count, columns)) {}

    // x: as many vectors, `stride` bytes apart.
    void pack(const void* x, Dtype dtype, int64_t stride) {
        parallel_for(count_, 16, [&](int64_t first, int64_t last) {
            for (int64_t v = first; v < last; ++v) put(v, static_cast<const uint8_t*>(x) + v * stride, dtype);
        });
    }
    void put(int64_t v, const void* x, Dtype dtype) {
        const int64_t start = v / PANEL * PANEL;
        pack_vector(x, dtype, columns_, v - start, std::min(PANEL, count_ - start), at(start));
    }
    bf16* at(int64_t start) { return memory_.data() + start * packed_columns(columns_); }

private:
    int64_t count_, columns_;
    Scratch<bf16> memory_;
};

// The tokens of one expert, by their slots.
struct Group {
    int64_t expert, start, count;
};

}  // namespace
}  // namespace lmx

using namespace lmx;

LMX_EXPORT int lmx_has_panels() { return has_panels(); }

// out [vectors, rows] = x [vectors, columns], `x_stride` elements apart, times one matrix; both of dtype.
LMX_EXPORT void lmx_multiply_many(const Matrix* m, const void* x, int64_t x_stride, int dtype, int64_t vectors,
                                  void* out) {
    const Dtype type = static_cast<Dtype>(dtype);
    Panels panels(vectors, m->columns);
    panels.pack(x, type, x_stride * size_of(type));
    parallel_for(m->rows, UNIT, [&](int64_t first, int64_t last) {
        alignas(64) float block[PANEL * UNIT];
        for (int64_t start = 0; start < vectors; start += PANEL) {
            const int64_t count = std::min(PANEL, vectors - start);
            for (int64_t row = first; row < last; row += UNIT) {
                const int64_t stop = std::min(row + UNIT, last);
                multiply_panel(*m, panels.at(start), count, row, stop, block, UNIT);
                for (int64_t v = 0; v < count; ++v) {
                    auto* to = static_cast<uint8_t*>(out) + ((start + v) * m->rows + row) * size_of(type);
                    store(block + v * UNIT, stop - row, type, to);
                }
            }
        }
    });
}

// lmx_experts (vector.cpp) for many tokens, whose slots are sorted by expert: `order` [slots] holds their numbers
// (token * top_k + k), `counts` [experts] how many each expert has. Experts add up in the order of their numbers.
LMX_EXPORT void lmx_experts_many(const Matrix (*bank)[3], int64_t experts, const void* x, int dtype, int64_t tokens,
                                 const int64_t* order, const int64_t* counts, const float* weights, int64_t top_k,
                                 int activation, void* out) {
    const Dtype type = static_cast<Dtype>(dtype);
    const int64_t slots = tokens * top_k, hidden = bank[0][0].columns, inner = bank[0][0].rows;
    Scratch<float> sums(tokens * hidden);
    Scratch<Group> groups(experts + slots / PANEL + 1);
    Scratch<bf16> inputs(slots * packed_columns(hidden)), between(slots * packed_columns(inner));
    int64_t group_count = 0, start = 0;
    for (int64_t e = 0; e < experts; start += counts[e++])
        for (int64_t at = 0; at < counts[e]; at += PANEL)
            groups.data()[group_count++] = {e, start + at, std::min(PANEL, counts[e] - at)};
    const Group* group = groups.data();

    parallel_each(group_count, [&](int64_t g) {
        for (int64_t i = 0; i < group[g].count; ++i) {
            const int64_t token = order[group[g].start + i] / top_k;
            const auto* row = static_cast<const uint8_t*>(x) + token * hidden * size_of(type);
            pack_vector(row, type, hidden, i, group[g].count, inputs.data() + group[g].start * packed_columns(hidden));
        }
    });
    const int64_t units = (inner + UNIT - 1) / UNIT;
    parallel_each(group_count * units, [&](int64_t item) {
        const Group& of = group[item / units];
        const int64_t row = item % units * UNIT, stop = std::min(row + UNIT, inner);
        alignas(64) float gate[PANEL * UNIT], up[PANEL * UNIT];
        const bf16* vectors = inputs.data() + of.start * packed_columns(hidden);
        multiply_panel(bank[of.expert][0], vectors, of.count, row, stop, gate, UNIT);
        multiply_panel(bank[of.expert][1], vectors, of.count, row, stop, up, UNIT);
        // As pack_vector would place them: DEPTH is whole units.
        const int64_t stretch = row / DEPTH * DEPTH, depth = packed_columns(std::min(DEPTH, inner - stretch));
        bf16* packed = between.data() + of.start * packed_columns(inner) + stretch * of.count;
        for (int64_t v = 0; v < of.count; ++v) {
            gate_with(gate + v * UNIT, up + v * UNIT, stop - row, static_cast<Activation>(activation));
            bf16* to = packed + v * depth + row - stretch;
            store(gate + v * UNIT, stop - row, BF16, to);
            for (int64_t i = stop - row; (row - stretch + i) % STEP; ++i) to[i] = 0;
        }
    });
    parallel_for(hidden, UNIT, [&](int64_t first, int64_t last) {
        alignas(64) float block[PANEL * UNIT];
        for (int64_t row = first; row < last; row += UNIT) {
            const int64_t stop = std::min(row + UNIT, last);
            for (int64_t t = 0; t < tokens; ++t)
                std::memset(sums.data() + t * hidden + row, 0, static_cast<size_t>(stop - row) * 4);
            for (int64_t g = 0; g < group_count; ++g) {
                const Group& of = group[g];
                const bf16* vectors = between.data() + of.start * packed_columns(inner);
                multiply_panel(bank[of.expert][2], vectors, of.count, row, stop, block, UNIT);
                for (int64_t v = 0; v < of.count; ++v) {
                    const int64_t slot = order[of.start + v];
                    float* sum = sums.data() + slot / top_k * hidden + row;
                    for (int64_t i = 0; i < stop - row; ++i) sum[i] += weights[slot] * block[v * UNIT + i];
                }
            }
            for (int64_t t = 0; t < tokens; ++t)
                store(sums.data() + t * hidden + row, stop - row, type,
                      static_cast<uint8_t*>(out) + (t * hidden + row) * size_of(type));
        }
    });
}
