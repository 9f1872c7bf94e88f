// The RG-LRU of Griffin with its gates (arXiv 2402.19427, section 2.4), on one path: tiles of a few channels of a head.
namespace lmx {
namespace {

// Rows of a gate's weights that are read at a time, so that memory is walked nearly in order.
constexpr int64_t GATE_ROWS = 8;

// products[c] = bias[c] + sum_i x[i] weight[i, c] for the channels of a tile; weight rows are `width` apart.
template <typename Stored>
LMX_TARGET void gate_products(const Stored* x, const Stored* weight, const Stored* bias, int64_t width,
                              int64_t channels, float* products) {
    for (int64_t c = 0; c < channels; c += LANES) store(load_some(bias + c, channels - c), products + c);
    for (int64_t i = 0; i < width; i += GATE_ROWS) {
        const int64_t rows = std::min(GATE_ROWS, width - i);
        float inputs[GATE_ROWS];
        for (int64_t r = 0; r < rows; ++r) {
            inputs[r] = value_of(x[i + r]);
            ask_for(weight + (i + r + 2 * GATE_ROWS) * width, channels * static_cast<int64_t>(sizeof(Stored)));
        }
        for (int64_t c = 0; c < channels; c += LANES) {
            Floats sum = load(products + c);
            for (int64_t r = 0; r < rows; ++r)
                sum = fused(load_some(weight + (i + r) * width + c, channels - c), spread(inputs[r]), sum);
            store(sum, products + c);
        }
    }
}

struct RecurrenceTile {
    int64_t row, head, first, channels;
    alignas(64) float states[RECURRENCE_TILE], input[RECURRENCE_TILE], recurrent[RECURRENCE_TILE];
};

// One step of the tile, from products of the gates to the answer. y = h gate.
template <typename Stored, typename Gate>
LMX_FORCE void recurrence_step(const Recurrence& r, RecurrenceTile& tile, int64_t t, const Gate* input,
                               const Gate* recurrent) {
    const int64_t token = tile.row * r.length + t, column = tile.head * r.width + tile.first;
    const auto* x = static_cast<const Stored*>(r.x) + token * r.x_stride + column;
    const auto* gate = static_cast<const Stored*>(r.gate) + token * r.gate_stride + column;
    auto* y = static_cast<Stored*>(r.y) + token * r.heads * r.width + column;
    const bool starts = r.reset[tile.row * r.reset_stride + t] != 0;
    for (int64_t c = 0; c < tile.channels; c += LANES) {
        const int64_t left = tile.channels - c;
        const Floats exponent = sigmoid_of(load_some(recurrent + c, left)) * load_some(r.rate + column + c, left);
        Floats drive = load_some(x + c, left) * sigmoid_of(load_some(input + c, left)), h = drive;
        if (!starts) {
            drive *= root_of(1.0f - exp2_of(2.0f * exponent));
            h = fused(exp2_of(exponent), load(tile.states + c), drive);
        }
        store(h, tile.states + c);
        if (r.gate) h *= load_some(gate + c, left);
        store_some(h, y + c, left);
    }
}

template <typename Stored>
LMX_TARGET void recurrence_with_weights(const Recurrence& r, RecurrenceTile& tile) {
    const int64_t column = tile.head * r.width, place = column * r.width + tile.first;
    const auto* x = static_cast<const Stored*>(r.x) + tile.row * r.x_stride + column;
    const auto weight = [place](const void* base) { return static_cast<const Stored*>(base) + place; };
    const auto bias = [&](const void* base) { return static_cast<const Stored*>(base) + column + tile.first; };
    gate_products(x, weight(r.input_weight), bias(r.input_bias), r.width, tile.channels, tile.input);
    gate_products(x, weight(r.recurrent_weight), bias(r.recurrent_bias), r.width, tile.channels, tile.recurrent);
    recurrence_step<Stored>(r, tile, 0, tile.input, tile.recurrent);
}

template <typename Stored>
LMX_TARGET void recurrence_of_products(const Recurrence& r, RecurrenceTile& tile, int64_t steps) {
    const int64_t place = (tile.head * r.batch + tile.row) * r.length * r.width + tile.first;
    const auto* input = static_cast<const Stored*>(r.input) + place;
    const auto* recurrent = static_cast<const Stored*>(r.recurrent) + place;
    for (int64_t t = 0; t < steps; ++t)
        recurrence_step<Stored>(r, tile, t, input + t * r.width, recurrent + t * r.width);
}

template <typename Stored>
LMX_TARGET void recurrence_tiles(const Recurrence& r, int64_t first, int64_t last) {
    const int64_t tiles = (r.width + RECURRENCE_TILE - 1) / RECURRENCE_TILE, total = r.heads * r.width;
    RecurrenceTile tile;
    for (int64_t i = first; i < last; ++i) {
        tile.row = i / (tiles * r.heads);
        tile.head = i / tiles % r.heads;
        tile.first = i % tiles * RECURRENCE_TILE;
        tile.channels = std::min(RECURRENCE_TILE, r.width - tile.first);
        const int64_t steps = r.lengths ? r.lengths[tile.row] : r.length, column = tile.head * r.width + tile.first;
        const int64_t place = tile.row * total + column;
        std::memcpy(tile.states, r.state + place, static_cast<size_t>(tile.channels) * 4);
        if (r.input_weight) recurrence_with_weights<Stored>(r, tile);
        else recurrence_of_products<Stored>(r, tile, steps);
        std::memcpy(r.new_state + place, tile.states, static_cast<size_t>(tile.channels) * 4);
        for (int64_t t = steps; t < r.length; ++t)
            std::memset(static_cast<Stored*>(r.y) + (tile.row * r.length + t) * total + column, 0,
                        static_cast<size_t>(tile.channels) * sizeof(Stored));
    }
}

LMX_TARGET void recurrence(const Recurrence& r, Dtype dtype, int64_t first, int64_t last) {
    if (dtype == F32) recurrence_tiles<float>(r, first, last);
    else recurrence_tiles<bf16>(r, first, last);
}

}  // namespace
}  // namespace lmx
