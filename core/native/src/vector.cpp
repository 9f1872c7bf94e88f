// Matrices times a few vectors: what Python calls.
//
// Rows are shared out among the threads, and each is summed by one of them in an order of its own: results do not
// depend on how many there are, nor on how many vectors come in one call.
#include "vector.h"

#include <algorithm>

#include "deal.h"
#include "prepared.h"

namespace lmx {
namespace {

// Below so many weights a second thread costs more than it brings.
constexpr int64_t WORTH_A_THREAD = 1 << 16;

int64_t grain(int64_t columns) { return std::max<int64_t>(16, WORTH_A_THREAD / columns / 2 / UNIT * UNIT); }

// Rows first .. last of a matrix into `out` [vectors, out_stride] of dtype: a unit at a time, so that it lies in the cache
// for the second group of vectors.
void multiply_rows(const Matrix& m, const Kernel& kernel, Prepared& x, int64_t first, int64_t last, Dtype dtype,
                   uint8_t* out, int64_t out_stride, Ahead then) {
    float sums[MAX_VECTORS * UNIT];
    for (int64_t row = first; row < last; row += UNIT) {
        const int64_t stop = std::min(row + UNIT, last);
        const Ahead ahead = stop < last ? ahead_of(m, stop) : then;
        for (int64_t v = 0; v < x.count(); v += MAX_VECTORS) {
            const Vectors some = x.some(kernel.layout, v, ahead);
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
    return has_avx512() ? avx512_kernel(m, dtype) : avx2_kernel(m.kind);
#elif defined(LMX_NEON)
    return neon_kernel(m.kind);
#else
    return portable_kernel(m.kind);
#endif
}

// As in core/native/vector.py. out [vectors, rows] = x [vectors, columns] times each of `count` matrices, side by side; rows:
// all of them together.
struct SideBySide {
    const Matrix* matrices;
    const void* x;
    void* out;
    int64_t count, vectors, rows;
    Dtype dtype;
};

static void multiply(const SideBySide& s) {
    const int64_t columns = s.matrices[0].columns;
    Prepared prepared(s.x, s.dtype, s.vectors, columns);
    for (int64_t i = 0; i < s.count; ++i) prepared.want(choose_kernel(s.matrices[i], s.dtype).layout);
    const auto rows = [&](Share::Range range, bool more) {
        int64_t before = 0;
        for (int64_t i = 0; i < s.count; before += s.matrices[i++].rows) {
            const Matrix& m = s.matrices[i];
            const int64_t from = std::max(range.first - before, int64_t{0}), to = std::min(range.last - before, m.rows);
            if (from >= to) continue;
            const Kernel kernel = choose_kernel(m, s.dtype);
            auto* at = static_cast<uint8_t*>(s.out) + before * size_of(s.dtype);
            multiply_rows(m, kernel, prepared, from, to, s.dtype, at, s.rows, more && to < m.rows ? ahead_of(m, to) : Ahead{});
        }
    };
    const int64_t unit = grain(columns);
    Deal deal(s.rows, unit);
    parallel_phases((s.rows + unit - 1) / unit, [&](Share share) { deal.run(share, rows); });
}

}  // namespace lmx

using namespace lmx;

// out [vectors, rows] = x [vectors, columns] times a matrix of floats.
LMX_EXPORT void lmx_multiply_kept(const uint8_t* data, int64_t rows, int64_t columns, int64_t kind, const void* x,
                                  int dtype, int64_t vectors, void* out) {
    Matrix matrix{};
    matrix.data = data, matrix.rows = rows, matrix.columns = columns, matrix.kind = static_cast<Kind>(kind);
    multiply(SideBySide{&matrix, x, out, 1, vectors, rows, static_cast<Dtype>(dtype)});
}

LMX_EXPORT void lmx_multiply(const void* product) { multiply(*static_cast<const SideBySide*>(product)); }
