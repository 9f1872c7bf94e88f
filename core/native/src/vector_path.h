// From the rows of one path to its kernels: an instance for each kind of matrix and each number of vectors. The file that
// includes this has defined LMX_TARGET, `Table`, `four_bit_row<VECTORS>` and `plain_row<KIND, VECTORS>`.
namespace lmx {
namespace {

template <int VECTORS>
LMX_TARGET void four_bit_of(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out,
                            int64_t out_stride) {
    const Table table(m.code);
    for (int64_t row = first; row < last; ++row)
        four_bit_row<VECTORS>(m, x, row, out + row - first, out_stride, table);
}

template <Kind KIND, int VECTORS>
void plain_of(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t out_stride) {
    for (int64_t row = first; row < last; ++row) plain_row<KIND, VECTORS>(m, x, row, out + row - first, out_stride);
}

void four_bit(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t out_stride) {
    static constexpr RowsFunction by_count[] = {four_bit_of<1>, four_bit_of<2>, four_bit_of<3>, four_bit_of<4>};
    by_count[x.count - 1](m, x, first, last, out, out_stride);
}

template <Kind KIND>
void plain(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t out_stride) {
    static constexpr RowsFunction by_count[] = {plain_of<KIND, 1>, plain_of<KIND, 2>, plain_of<KIND, 3>,
                                                plain_of<KIND, 4>};
    by_count[x.count - 1](m, x, first, last, out, out_stride);
}

Kernel kernel_of(Kind kind) {
    switch (kind) {
        case FOUR_BIT: return {SPLIT_F32, four_bit};
        case INT8: return {PLAIN_F32, plain<INT8>};
        case KEPT_BF16: return {PLAIN_F32, plain<KEPT_BF16>};
        case KEPT_F16: return {PLAIN_F32, plain<KEPT_F16>};
        default: return {PLAIN_F32, plain<KEPT_F32>};
    }
}

}  // namespace
}  // namespace lmx
