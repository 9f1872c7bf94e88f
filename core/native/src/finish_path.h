// What stands between the products of a step, element by element, on one path (floats.h).
namespace lmx {
namespace {

template <typename Stream, typename Out>
LMX_TARGET void finish_as(const Finish& f) {
    const auto* stream = static_cast<const Stream*>(f.stream);
    auto* out = static_cast<Out*>(f.out);
    for (int64_t i = 0; i < f.count; i += LANES) {
        const int64_t left = f.count - i;
        Floats some = rounded(load_some(f.sums + i, left), bf16{});
        if (f.bias) some = rounded(some + load_some(f.bias + i, left), bf16{});
        if (stream) some += load_some(stream + i, left);
        store_some(some, out + i, left);
    }
}

LMX_TARGET void finish(const Finish& f) {
    if (f.out_dtype == BF16) finish_as<bf16, bf16>(f);
    else if (f.stream_dtype == BF16) finish_as<bf16, float>(f);
    else finish_as<float, float>(f);
}

LMX_FORCE Floats activated(Floats x, int activation) {
    if (activation == 0) return silu_of(x);
    if (activation == 2) return x * sigmoid_of(1.5957691216f * fused(x * x * x, spread(0.044715f), x));
    return x < 0 ? Floats{} : x;
}

LMX_TARGET void gate(const Gate& g) {
    for (int64_t i = 0; i < g.count; i += LANES) {
        const int64_t left = g.count - i;
        Floats some = rounded(activated(load_some(g.gate + i, left), g.activation), bf16{});
        if (g.up) some *= load_some(g.up + i, left);
        store_some(some, g.out + i, left);
    }
}

// tanh to a few units in the last place: near zero by its series, where the other form would cancel.
LMX_FORCE Floats tanh_of(Floats x) {
    const Floats square = x * x;
    Floats series = fused(square, spread(-0.053968254f), spread(0.13333333f));
    series = fused(fused(series, square, spread(-0.33333333f)) * square, x, x);
    const Floats whole = 1.0f - 2.0f / (1.0f + exp2_of(x * (2 * LOG2_E)));
    return square < 0.02f ? series : whole;
}

// cap tanh(x / cap), each of the three rounded.
LMX_TARGET void soft_cap(bf16* x, int64_t count, float cap) {
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t left = count - i;
        const Floats within = rounded(load_some(x + i, left) / cap, bf16{});
        store_some(rounded(tanh_of(within), bf16{}) * cap, x + i, left);
    }
}

}  // namespace
}  // namespace lmx
