// The selective scan of Mamba with what stands before and behind it (arXiv 2312.00752, algorithm 2), on one path.
// Tiles of a few channels and a few steps live in the first cache; within one, channels lie side by side in a register
// and the states of a register's channels stay in registers from step to step. States of all steps exist nowhere.
namespace lmx {
namespace {

constexpr int64_t SCAN_STEPS = 16;
// States that stay in registers at a time; their number is filled up to a multiple of it by zeros.
constexpr int64_t GROUP = LANES == 16 ? 16 : 8;
constexpr int64_t GROUPED_STATES = (MAX_STATES + GROUP - 1) / GROUP * GROUP;

struct ScanTile {
    int64_t row, first, channels, padded_states;
    alignas(64) float delta[SCAN_STEPS][CHANNEL_GRAIN], drive[SCAN_STEPS][CHANNEL_GRAIN], y[SCAN_STEPS][CHANNEL_GRAIN];
    alignas(64) float B[SCAN_STEPS][GROUPED_STATES], C[SCAN_STEPS][GROUPED_STATES];
    alignas(64) float rates[GROUPED_STATES][CHANNEL_GRAIN], states[GROUPED_STATES][CHANNEL_GRAIN];
};

// Steps, or channels of one step, that are asked for ahead of the one that is computed.
constexpr int64_t SCAN_AHEAD = 16, CHANNELS_AHEAD = 32;

template <typename Stored>
LMX_FORCE const Stored* at(const void* base, int64_t stride, int64_t token, int64_t column) {
    return static_cast<const Stored*>(base) + token * stride + column;
}

// delta, delta x, B and C of `count` steps from `token` on.
template <typename Stored>
LMX_TARGET void enter_steps(const Scan& s, ScanTile& tile, int64_t token, int64_t count) {
    const auto* bias = static_cast<const Stored*>(s.bias) + tile.first;
    for (int64_t t = 0; t < count; ++t) {
        const Stored* raw = at<Stored>(s.raw, s.raw_stride, token + t, tile.first);
        const Stored* x = at<Stored>(s.x, s.x_stride, token + t, tile.first);
        const int64_t bytes = tile.channels * static_cast<int64_t>(sizeof(Stored));
        if (s.length > SCAN_AHEAD) {
            ask_for(raw + SCAN_AHEAD * s.raw_stride, bytes);
            ask_for(x + SCAN_AHEAD * s.x_stride, bytes);
            ask_for(at<Stored>(s.gate, s.gate_stride, token + t + SCAN_AHEAD, tile.first), bytes);
            ask_for(static_cast<Stored*>(s.y) + (token + t + SCAN_AHEAD) * s.inner + tile.first, bytes);
        }
        for (int64_t c = 0; c < tile.channels; c += LANES) {
            const int64_t left = tile.channels - c;
            const Floats delta = softplus_of(load_some(raw + c, left) + load_some(bias + c, left));
            store(delta, tile.delta[t] + c);
            store(delta * load_some(x + c, left), tile.drive[t] + c);
        }
        const Stored *B = at<Stored>(s.B, s.b_stride, token + t, 0), *C = at<Stored>(s.C, s.b_stride, token + t, 0);
        for (int64_t n = 0; n < s.states; n += LANES) {
            store_some(load_some(B + n, s.states - n), tile.B[t] + n, s.states - n);
            store_some(load_some(C + n, s.states - n), tile.C[t] + n, s.states - n);
        }
        for (int64_t n = s.states; n < tile.padded_states; ++n) tile.B[t][n] = tile.C[t][n] = 0;
    }
}

// y = (scan + D x) silu(gate) of `count` steps.
template <typename Stored>
LMX_TARGET void leave_steps(const Scan& s, const ScanTile& tile, int64_t token, int64_t count) {
    const auto* skip = static_cast<const Stored*>(s.D) + tile.first;
    for (int64_t t = 0; t < count; ++t) {
        const Stored* x = at<Stored>(s.x, s.x_stride, token + t, tile.first);
        const Stored* gate = at<Stored>(s.gate, s.gate_stride, token + t, tile.first);
        Stored* y = static_cast<Stored*>(s.y) + (token + t) * s.inner + tile.first;
        for (int64_t c = 0; c < tile.channels; c += LANES) {
            const int64_t left = tile.channels - c;
            const Floats sum = fused(load_some(x + c, left), load_some(skip + c, left), load(tile.y[t] + c));
            store_some(sum * silu_of(load_some(gate + c, left)), y + c, left);
        }
    }
}

// One register of channels, one group of states, all steps of the tile. `B` and `C`: of the group, a step after another.
LMX_TARGET void scan_group(const float* delta, const float* drive, const float* B, const float* C, const float* rates,
                           float* states, float* y, int64_t count, bool add) {
    Floats h[GROUP];
#pragma GCC unroll 16
    for (int64_t n = 0; n < GROUP; ++n) h[n] = load(states + n * CHANNEL_GRAIN);
    for (int64_t t = 0; t < count; ++t) {
        const Floats step = load(delta + t * CHANNEL_GRAIN), input = load(drive + t * CHANNEL_GRAIN);
        Floats sums[2] = {add ? load(y + t * CHANNEL_GRAIN) : Floats{}, Floats{}};
#pragma GCC unroll 16
        for (int64_t n = 0; n < GROUP; ++n) {
            const Floats decay = exp2_of(step * load(rates + n * CHANNEL_GRAIN));
            h[n] = fused(decay, h[n], input * B[t * GROUPED_STATES + n]);
            sums[n % 2] = fused(h[n], spread(C[t * GROUPED_STATES + n]), sums[n % 2]);
        }
        store(sums[0] + sums[1], y + t * CHANNEL_GRAIN);
    }
#pragma GCC unroll 16
    for (int64_t n = 0; n < GROUP; ++n) store(h[n], states + n * CHANNEL_GRAIN);
}

// Channels side by side: rates and states of the tile, from [channels, states] and back.
LMX_TARGET inline void turn_in(const Scan& s, ScanTile& tile) {
    const float* A = s.A + tile.first * s.states;
    const float* states = s.state + (tile.row * s.inner + tile.first) * s.states;
    std::memset(tile.rates, 0, static_cast<size_t>(tile.padded_states) * sizeof tile.rates[0]);
    std::memset(tile.states, 0, static_cast<size_t>(tile.padded_states) * sizeof tile.states[0]);
    for (int64_t c = 0; c < tile.channels; ++c)
        for (int64_t n = 0; n < s.states; ++n) {
            tile.rates[n][c] = A[c * s.states + n] * LOG2_E;
            tile.states[n][c] = states[c * s.states + n];
        }
}

LMX_TARGET inline void turn_out(const Scan& s, const ScanTile& tile) {
    float* states = s.new_state + (tile.row * s.inner + tile.first) * s.states;
    for (int64_t c = 0; c < tile.channels; ++c)
        for (int64_t n = 0; n < s.states; ++n) states[c * s.states + n] = tile.states[n][c];
}

template <typename Stored>
LMX_TARGET void scan_tile(const Scan& s, ScanTile& tile, int64_t steps) {
    turn_in(s, tile);
    for (int64_t t = 0; t < steps; t += SCAN_STEPS) {
        const int64_t token = tile.row * s.length + t, count = std::min(SCAN_STEPS, steps - t);
        enter_steps<Stored>(s, tile, token, count);
        for (int64_t c = 0; c < tile.channels; c += LANES)
            for (int64_t n = 0; n < tile.padded_states; n += GROUP)
                scan_group(tile.delta[0] + c, tile.drive[0] + c, tile.B[0] + n, tile.C[0] + n, tile.rates[n] + c,
                           tile.states[n] + c, tile.y[0] + c, count, n > 0);
        leave_steps<Stored>(s, tile, token, count);
    }
    turn_out(s, tile);
}

// One step: the states of a channel side by side, as they lie in memory, since nothing would repay turning them.
template <typename Stored>
LMX_TARGET void scan_step(const Scan& s, ScanTile& tile) {
    enter_steps<Stored>(s, tile, tile.row, 1);
    const float* A = s.A + tile.first * s.states;
    const int64_t place = (tile.row * s.inner + tile.first) * s.states;
    const float* states = s.state + place;
    float* new_states = s.new_state + place;
    for (int64_t c = 0; c < tile.channels; ++c) {
        ask_for(A + (c + CHANNELS_AHEAD) * s.states, s.states * 4);
        ask_for(states + (c + CHANNELS_AHEAD) * s.states, s.states * 4);
        Floats sum = {};
        for (int64_t n = 0; n < s.states; n += LANES) {
            const Floats decay = exp2_of(load(A + c * s.states + n) * LOG2_E * tile.delta[0][c]);
            const Floats h = fused(decay, load(states + c * s.states + n), load(tile.B[0] + n) * tile.drive[0][c]);
            store(h, new_states + c * s.states + n);
            sum = fused(h, load(tile.C[0] + n), sum);
        }
        tile.y[0][c] = sum_of(sum);
    }
    leave_steps<Stored>(s, tile, tile.row, 1);
}

template <typename Stored>
LMX_TARGET void scan_tiles(const Scan& s, int64_t first, int64_t last) {
    const int64_t tiles = (s.inner + CHANNEL_GRAIN - 1) / CHANNEL_GRAIN;
    ScanTile tile;
    tile.padded_states = (s.states + GROUP - 1) / GROUP * GROUP;
    for (int64_t i = first; i < last; ++i) {
        tile.row = i / tiles;
        tile.first = i % tiles * CHANNEL_GRAIN;
        tile.channels = std::min(CHANNEL_GRAIN, s.inner - tile.first);
        const int64_t steps = s.lengths ? s.lengths[tile.row] : s.length;
        if (steps == 1 && s.length == 1 && s.states % LANES == 0) scan_step<Stored>(s, tile);
        else scan_tile<Stored>(s, tile, steps);
        for (int64_t t = steps; t < s.length; ++t)
            std::memset(static_cast<Stored*>(s.y) + (tile.row * s.length + t) * s.inner + tile.first, 0,
                        static_cast<size_t>(tile.channels) * sizeof(Stored));
    }
}

LMX_TARGET void scan(const Scan& s, Dtype dtype, int64_t first, int64_t last) {
    if (dtype == F32) scan_tiles<float>(s, first, last);
    else scan_tiles<bf16>(s, first, last);
}

}  // namespace
}  // namespace lmx
