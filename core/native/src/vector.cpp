// Matrices times a few vectors, and banks of experts for a few tokens: what Python calls.
//
// Rows are shared out among the threads, and each is summed by one of them in an order of its own: results do not
// depend on how many there are, nor on how many vectors come in one call.
#include "vector.h"

#include <algorithm>

#include "prepare.h"
#include "scratch.h"

namespace lmx {
namespace {

// Below so many weights a second thread costs more than it brings.
constexpr int64_t WORTH_A_THREAD = 1 << 16;

int64_t grain(int64_t columns) { return std::max<int64_t>(16, WORTH_A_THREAD / columns / 2 / UNIT * UNIT); }

// Vectors in every layout that some matrix of a call asks for.
class Prepared {
public:
    Prepared(const void* x, Dtype dtype, int64_t count, int64_t columns)
        : x_(x), dtype_(dtype), count_(count), columns_(columns), memory_(LAYOUTS * count * padded(columns)) {}

    // Before the threads start.
    void want(Layout layout) {
        if (made_[layout]) return;
        made_[layout] = true;
        const auto* from = static_cast<const uint8_t*>(x_);
        for (int64_t v = 0; v < count_; ++v)
            prepare(from + v * columns_ * size_of(dtype_), dtype_, columns_, layout, place(layout, v));
    }

    int64_t count() const { return count_; }
    // As many from `v` on as a kernel takes.
    Vectors some(Layout layout, int64_t v) {
        return {place(layout, v), std::min<int64_t>(count_ - v, MAX_VECTORS), columns_, padded(columns_)};
    }
    Vectors one(Layout layout, int64_t v) { return {place(layout, v), 1, columns_, padded(columns_)}; }

private:
    void* place(Layout layout, int64_t v) {
        return reinterpret_cast<uint8_t*>(memory_.data() + layout * count_ * padded(columns_)) +
               v * padded(columns_) * size_of(layout);
    }
    const void* x_;
    Dtype dtype_;
    int64_t count_, columns_;
    bool made_[LAYOUTS] = {};
    Scratch<float> memory_;
};

// Rows first .. last of a matrix into `out` [vectors, out_stride] of dtype: a unit at a time, so that it lies in the cache
// for the second group of vectors.
void multiply_rows(const Matrix& m, const Kernel& kernel, Prepared& x, int64_t first, int64_t last, Dtype dtype,
                   uint8_t* out, int64_t out_stride) {
    float sums[MAX_VECTORS * UNIT];
    for (int64_t row = first; row < last; row += UNIT) {
        const int64_t stop = std::min(row + UNIT, last);
        for (int64_t v = 0; v < x.count(); v += MAX_VECTORS) {
            const Vectors some = x.some(kernel.layout, v);
            kernel.rows(m, some, row, stop, sums, UNIT);
            for (int64_t i = 0; i < some.count; ++i)
                store(sums + i * UNIT, stop - row, dtype, out + ((v + i) * out_stride + row) * size_of(dtype));
        }
    }
}

}  // namespace

Kernel choose_kernel(const Matrix& m, [[maybe_unused]] Dtype dtype) {
    const Level path = level();
    const bool whole = m.kind != FOUR_BIT || (m.columns % UNIT == 0 && m.block_size >= UNIT);
    if (path == PORTABLE || !whole) return portable_kernel(m.kind);
#if defined(LMX_X86)
    return path == AVX512 ? avx512_kernel(m, dtype) : avx2_kernel(m.kind);
#elif defined(LMX_NEON)
    return neon_kernel(m.kind);
#else
    return portable_kernel(m.kind);
#endif
}

static void multiply(const Matrix* matrices, int64_t count, const void* x, Dtype type, int64_t vectors,
                     int64_t total_rows, void* out) {
    const int64_t columns = matrices[0].columns;
    Prepared prepared(x, type, vectors, columns);
    for (int64_t i = 0; i < count; ++i) prepared.want(choose_kernel(matrices[i], type).layout);
    parallel_for(total_rows, grain(columns), [&](int64_t first, int64_t last) {
        int64_t before = 0;
        for (int64_t i = 0; i < count; before += matrices[i++].rows) {
            const Matrix& m = matrices[i];
            const int64_t from = std::max(first - before, int64_t{0}), to = std::min(last - before, m.rows);
            if (from >= to) continue;
            const Kernel kernel = choose_kernel(m, type);
            auto* at = static_cast<uint8_t*>(out) + before * size_of(type);
            multiply_rows(m, kernel, prepared, from, to, type, at, total_rows);
        }
    });
}

}  // namespace lmx

using namespace lmx;

// out [vectors, rows] = x [vectors, columns] times a matrix of floats.
LMX_EXPORT void lmx_multiply_kept(const uint8_t* data, int64_t rows, int64_t columns, int64_t kind, const void* x,
                                  int dtype, int64_t vectors, void* out) {
    Matrix matrix{};
    matrix.data = data, matrix.rows = rows, matrix.columns = columns, matrix.kind = static_cast<Kind>(kind);
    multiply(&matrix, 1, x, static_cast<Dtype>(dtype), vectors, rows, out);
}

// out [vectors, sum of rows] = x [vectors, columns] times each matrix of the table, side by side.
LMX_EXPORT void lmx_multiply(const Matrix* matrices, int64_t count, const void* x, int dtype, int64_t vectors,
                             int64_t total_rows, void* out) {
    multiply(matrices, count, x, static_cast<Dtype>(dtype), vectors, total_rows, out);
}

// A bank of gated MLPs: out[t] = sum_k weights[t, k] * down_e(activation(gate_e(x_t)) * up_e(x_t)), e = ids[t, k].
//
// bank: [experts][gate, up, down]; x, out [tokens, hidden] of dtype; ids, weights [tokens, top_k].
// Returns 1, and does nothing, where an id is that of no expert.
LMX_EXPORT int lmx_experts(const Matrix (*bank)[3], int64_t experts, const void* x, int dtype, int64_t tokens,
                           const int64_t* ids, const float* weights, int64_t top_k, int activation, void* out) {
    const Dtype type = static_cast<Dtype>(dtype);
    const int64_t slots = tokens * top_k, hidden = bank[0][0].columns, inner = bank[0][0].rows;
    for (int64_t slot = 0; slot < slots; ++slot)
        if (ids[slot] < 0 || ids[slot] >= experts) return 1;
    Prepared prepared(x, type, tokens, hidden);
    for (int64_t slot = 0; slot < slots; ++slot) {
        prepared.want(choose_kernel(bank[ids[slot]][0], type).layout);
        prepared.want(choose_kernel(bank[ids[slot]][1], type).layout);
    }
    Scratch<float> between(slots * padded(inner));  // [slots, inner] in the layout of its expert's `down`
    const int64_t stretches = padded(inner) / STRETCH;
    parallel_for(slots * stretches, 1, [&](int64_t first, int64_t last) {
        for (int64_t at = first; at < last; ++at) {
            const int64_t slot = at / stretches, row = at % stretches * STRETCH;
            const int64_t stop = std::min(row + STRETCH, inner);
            const auto& [gate, up, down] = bank[ids[slot]];
            float sums[2][STRETCH];
            const Matrix* pair[] = {&gate, &up};
            for (int i = 0; i < 2; ++i) {
                const Kernel kernel = choose_kernel(*pair[i], type);
                kernel.rows(*pair[i], prepared.one(kernel.layout, slot / top_k), row, stop, sums[i], STRETCH);
            }
            gate_with(sums[0], sums[1], stop - row, static_cast<Activation>(activation));
            const Layout layout = choose_kernel(down, type).layout;
            auto* vector = reinterpret_cast<uint8_t*>(between.data() + slot * padded(inner));
            prepare(sums[0], F32, stop - row, layout, vector + row * size_of(layout));
        }
    });
    parallel_for(hidden, UNIT, [&](int64_t first, int64_t last) {
        for (int64_t token = 0; token < tokens; ++token)
            for (int64_t row = first; row < last; row += UNIT) {
                const int64_t stop = std::min(row + UNIT, last);
                float sums[UNIT] = {}, part[UNIT];
                for (int64_t slot = token * top_k; slot < (token + 1) * top_k; ++slot) {
                    const Matrix& down = bank[ids[slot]][2];
                    const Kernel kernel = choose_kernel(down, type);
                    const Vectors vector{between.data() + slot * padded(inner), 1, inner, padded(inner)};
                    kernel.rows(down, vector, row, stop, part, UNIT);
                    for (int64_t i = 0; i < stop - row; ++i) sums[i] += weights[slot] * part[i];
                }
                store(sums, stop - row, type, static_cast<uint8_t*>(out) + (token * hidden + row) * size_of(type));
            }
    });
    return 0;
}
