// The short causal convolution before a recurrence, on one path: tiles of a few channels, all steps.
namespace lmx {
namespace {

constexpr int64_t CONV_STEPS = 32, CONV_AHEAD = 16, USUAL_KERNEL = 4;

struct ConvTile {
    int64_t row, first, channels;
    alignas(64) float taps[MAX_KERNEL][CHANNEL_GRAIN], bias[CHANNEL_GRAIN];
    alignas(64) float inputs[MAX_KERNEL - 1 + CONV_STEPS][CHANNEL_GRAIN];
};

// KERNEL: the number of taps where it is known, so that a compiler can turn the loops into vector code; else 0.
template <typename Stored, int64_t KERNEL>
LMX_TARGET void enter_conv(const Conv& v, ConvTile& tile) {
    const int64_t kernel = KERNEL ? KERNEL : v.kernel, reach = kernel - 1;
    const auto* weight = static_cast<const Stored*>(v.weight) + tile.first * v.kernel;
    const auto* state = static_cast<const Stored*>(v.state) + (tile.row * v.channels + tile.first) * reach;
    const auto* bias = static_cast<const Stored*>(v.bias) + tile.first;
    for (int64_t c = 0; c < tile.channels; ++c) {
        for (int64_t j = 0; j < kernel; ++j) tile.taps[j][c] = value_of(weight[c * kernel + j]);
        for (int64_t j = 0; j < reach; ++j) tile.inputs[j][c] = value_of(state[c * reach + j]);
    }
    for (int64_t c = 0; c < tile.channels; ++c) tile.bias[c] = v.bias ? value_of(bias[c]) : 0;
}

// The inputs that the next call still needs.
template <typename Stored, int64_t KERNEL>
LMX_TARGET void leave_conv(const Conv& v, const ConvTile& tile) {
    const int64_t reach = (KERNEL ? KERNEL : v.kernel) - 1;
    auto* state = static_cast<Stored*>(v.new_state) + (tile.row * v.channels + tile.first) * reach;
    for (int64_t c = 0; c < tile.channels; ++c)
        for (int64_t j = 0; j < reach; ++j) set_value(tile.inputs[j][c], state + c * reach + j);
}

template <typename Stored>
LMX_TARGET void conv_steps(const Conv& v, ConvTile& tile, int64_t token, int64_t count) {
    for (int64_t t = 0; t < count; ++t) {
        const Stored* x = static_cast<const Stored*>(v.x) + (token + t) * v.x_stride + tile.first;
        Stored* y = static_cast<Stored*>(v.y) + (token + t) * v.channels + tile.first;
        const int64_t bytes = tile.channels * static_cast<int64_t>(sizeof(Stored));
        if (v.length > CONV_AHEAD) {
            ask_for(x + CONV_AHEAD * v.x_stride, bytes);
            ask_for(y + CONV_AHEAD * v.channels, bytes);
        }
        for (int64_t c = 0; c < tile.channels; c += LANES) {
            const int64_t left = tile.channels - c;
            store(load_some(x + c, left), tile.inputs[t + v.kernel - 1] + c);
            Floats sum = load(tile.bias + c);
            for (int64_t j = 0; j < v.kernel; ++j) sum = fused(load(tile.inputs[t + j] + c), load(tile.taps[j] + c), sum);
            store_some(v.silu ? silu_of(sum) : sum, y + c, left);
        }
    }
    // the inputs that the next steps still need move to the front
    std::memmove(tile.inputs[0], tile.inputs[count], static_cast<size_t>(v.kernel - 1) * sizeof tile.inputs[0]);
}

template <typename Stored>
LMX_TARGET void conv_tiles(const Conv& v, int64_t first, int64_t last) {
    const int64_t tiles = (v.channels + CHANNEL_GRAIN - 1) / CHANNEL_GRAIN;
    const bool usual = v.kernel == USUAL_KERNEL;
    ConvTile tile;
    for (int64_t i = first; i < last; ++i) {
        tile.row = i / tiles;
        tile.first = i % tiles * CHANNEL_GRAIN;
        tile.channels = std::min(CHANNEL_GRAIN, v.channels - tile.first);
        usual ? enter_conv<Stored, USUAL_KERNEL>(v, tile) : enter_conv<Stored, 0>(v, tile);
        for (int64_t t = 0; t < v.length; t += CONV_STEPS)
            conv_steps<Stored>(v, tile, tile.row * v.length + t, std::min(CONV_STEPS, v.length - t));
        usual ? leave_conv<Stored, USUAL_KERNEL>(v, tile) : leave_conv<Stored, 0>(v, tile);
    }
}

LMX_TARGET void conv(const Conv& v, Dtype dtype, int64_t first, int64_t last) {
    if (dtype == F32) conv_tiles<float>(v, first, last);
    else conv_tiles<bf16>(v, first, last);
}

}  // namespace
}  // namespace lmx
