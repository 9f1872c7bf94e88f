// Root-mean-square norms of rows, on one path (floats.h).
namespace lmx {
namespace {

// x in the precision that the answer has.
template <typename Stored, typename Given>
LMX_FORCE Floats taken(const Given* x, int64_t count) {
    const Floats some = load_some(x, count);
    return sizeof(Given) == sizeof(Stored) ? some : rounded(some, Stored{});
}

template <typename Given, typename Stored>
LMX_TARGET void norm_rows(const Norm& n, int64_t first, int64_t last) {
    const auto* weight = static_cast<const Stored*>(n.weight);
    for (int64_t row = first; row < last; ++row) {
        const Given* x = static_cast<const Given*>(n.x) + row * n.x_stride;
        Stored* y = static_cast<Stored*>(n.y) + row * n.y_stride;
        Floats sums[4] = {};
        for (int64_t i = 0, part = 0; i < n.width; i += LANES, part = (part + 1) % 4) {
            const Floats some = taken<Stored>(x + i, n.width - i);
            sums[part] = fused(some, some, sums[part]);
        }
        const float square = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
        const float factor = 1.0f / std::sqrt(square / static_cast<float>(n.width) + n.eps);
        for (int64_t i = 0; i < n.width; i += LANES) {
            const int64_t left = n.width - i;
            Floats some = taken<Stored>(x + i, left) * factor;
            if (n.offset) some *= 1.0f + load_some(weight + i, left);
            else if (weight) some = rounded(some, Stored{}) * load_some(weight + i, left);
            store_some(some, y + i, left);
        }
    }
}

LMX_TARGET void norm(const Norm& n, Dtype dtype, int64_t first, int64_t last) {
    if (dtype == F32) norm_rows<float, float>(n, first, last);
    else if (n.x_dtype == F32) norm_rows<float, bf16>(n, first, last);
    else norm_rows<bf16, bf16>(n, first, last);
}

}  // namespace
}  // namespace lmx
