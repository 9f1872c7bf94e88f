// Sums of two tensors, on one path (floats.h).
namespace lmx {
namespace {

template <typename Left, typename Right, typename Sum>
LMX_TARGET void add_rows(const Add& a, int64_t first, int64_t last) {
    const auto* right = static_cast<const Right*>(a.right);
    for (int64_t row = first; row < last; ++row) {
        const Left* left = static_cast<const Left*>(a.left) + row * a.width;
        Sum* sum = static_cast<Sum*>(a.sum) + row * a.width;
        for (int64_t i = 0; i < a.width; i += LANES) {
            const int64_t count = a.width - i;
            store_some(load_some(left + i, count) + load_some(right + row * a.right_stride + i, count), sum + i, count);
        }
    }
}

LMX_TARGET void add(const Add& a, int64_t first, int64_t last) {
    if (a.sum_dtype == BF16) add_rows<bf16, bf16, bf16>(a, first, last);
    else if (a.left_dtype == BF16) add_rows<bf16, bf16, float>(a, first, last);
    else if (a.right_dtype == BF16) add_rows<float, bf16, float>(a, first, last);
    else add_rows<float, float, float>(a, first, last);
}

}  // namespace
}  // namespace lmx
