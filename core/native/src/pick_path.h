// What is asked of logits, on one path (floats.h): float or bf16, a chunk at a time.
#include <limits>

namespace lmx {
namespace {

// The first `count` elements, and behind them what is smaller than all.
template <typename Stored>
LMX_FORCE Floats load_or_least(const Stored* x, int64_t count) {
    Floats some = load_some(x, count);
    for (int64_t i = count; i < LANES; ++i) some[i] = -std::numeric_limits<float>::infinity();
    return some;
}

template <typename Stored>
LMX_TARGET float largest_of(const Stored* x, int64_t count) {
    Floats most[4];
    for (Floats& each : most) each = spread(-std::numeric_limits<float>::infinity());
    Words nan{};
    for (int64_t i = 0, part = 0; i < count; i += LANES, part = (part + 1) % 4) {
        const Floats some = load_or_least(x + i, count - i);
        most[part] = some > most[part] ? some : most[part];
        nan |= reinterpret_cast<Words>(some != some);
    }
    float found = -std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < LANES; ++i) {
        if (nan[i]) return std::numeric_limits<float>::quiet_NaN();
        for (const Floats& each : most) found = each[i] > found ? each[i] : found;
    }
    return found;
}

// Where `value` stands first, or the first NaN where it is one.
template <typename Stored>
LMX_TARGET int64_t place_of(const Stored* x, int64_t count, float value) {
    constexpr int64_t STRIDE = 8 * LANES;
    int64_t i = 0;
    for (; i + STRIDE <= count; i += STRIDE) {
        Words found{};
        for (int64_t j = 0; j < STRIDE; j += LANES) {
            const Floats some = load(x + i + j);
            found |= reinterpret_cast<Words>(some == value) | reinterpret_cast<Words>(some != some);
        }
        bool any = false;
        for (int64_t j = 0; j < LANES; ++j) any |= found[j] != 0;
        if (any) break;
    }
    for (; i < count; ++i) {
        const float one = value_of(x[i]);
        if (one == value || one != one) return i;
    }
    return 0;
}

template <typename Stored>
LMX_TARGET float exponentials_of(const Stored* x, int64_t count, float largest) {
    Floats sums[4] = {};
    for (int64_t i = 0, part = 0; i < count; i += LANES, part = (part + 1) % 4)
        sums[part] += exp2_of((load_or_least(x + i, count - i) - largest) * LOG2_E);
    return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

LMX_TARGET float largest(const void* x, Dtype dtype, int64_t count) {
    if (dtype == F32) return largest_of(static_cast<const float*>(x), count);
    return largest_of(static_cast<const bf16*>(x), count);
}

LMX_TARGET int64_t place(const void* x, Dtype dtype, int64_t count, float value) {
    if (dtype == F32) return place_of(static_cast<const float*>(x), count, value);
    return place_of(static_cast<const bf16*>(x), count, value);
}

// The sum of e^(x - largest).
LMX_TARGET float exponentials(const void* x, Dtype dtype, int64_t count, float largest) {
    if (dtype == F32) return exponentials_of(static_cast<const float*>(x), count, largest);
    return exponentials_of(static_cast<const bf16*>(x), count, largest);
}

}  // namespace
}  // namespace lmx
