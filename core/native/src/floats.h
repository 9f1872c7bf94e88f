// Vectors of floats for one path: what the kernels in lanes_path.h are written in. The file that includes this says how
// wide its registers are (LMX_LANES) and for which CPU to compile (LMX_TARGET). Functions that meet vectors must be
// compiled for that CPU themselves: one that the paths shared would be lowered to the oldest before it is inlined.
#include <cmath>

#include "lmx_native.h"

namespace lmx {
namespace {

#define LMX_FORCE LMX_TARGET inline __attribute__((always_inline))

constexpr int64_t LANES = LMX_LANES;
using Floats = float __attribute__((vector_size(4 * LMX_LANES)));
using Words = uint32_t __attribute__((vector_size(4 * LMX_LANES)));
using Halves = uint16_t __attribute__((vector_size(2 * LMX_LANES)));

LMX_FORCE Words words_of(Floats x) {
    Words out;
    std::memcpy(&out, &x, sizeof out);
    return out;
}

LMX_FORCE Floats floats_of(Words x) {
    Floats out;
    std::memcpy(&out, &x, sizeof out);
    return out;
}

LMX_FORCE Floats spread(float x) { return x - Floats{}; }

LMX_FORCE Floats load(const float* at) {
    Floats out;
    std::memcpy(&out, at, sizeof out);
    return out;
}

LMX_FORCE Floats load(const bf16* at) {
    Halves halves;
    std::memcpy(&halves, at, sizeof halves);
#if LMX_LANES == 16
    return floats_of(reinterpret_cast<Words>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(halves))) << 16);
#else
    return floats_of(__builtin_convertvector(halves, Words) << 16);
#endif
}

// Round to nearest even, NaN stays NaN: as float_to_bf16, the bits still in their float.
LMX_FORCE Floats rounded(Floats x, bf16) {
    const Words bits = words_of(x);
    const Words even = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    return x == x ? floats_of(even) : floats_of(bits | 0x400000u);
}

LMX_FORCE Floats rounded(Floats x, float) { return x; }

LMX_FORCE void store(Floats x, float* at) { std::memcpy(at, &x, sizeof x); }

LMX_FORCE void store(Floats x, bf16* at) {
    const Words words = words_of(rounded(x, bf16{})) >> 16;
#if LMX_LANES == 16
    const __m256i halves = _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(words));
#else
    const Halves halves = __builtin_convertvector(words, Halves);
#endif
    std::memcpy(at, &halves, sizeof halves);
}

// Ask for the `bytes` that a later step of a tile reads: tokens are a page apart, where no hardware looks ahead.
LMX_FORCE void ask_for(const void* base, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(base) + i, 0, 2);
}

// The first `count` elements, zeros behind them.
template <typename Stored>
LMX_FORCE Floats load_some(const Stored* at, int64_t count) {
    if (count >= LANES) return load(at);
    Stored some[LANES] = {};
    std::memcpy(some, at, static_cast<size_t>(count) * sizeof(Stored));
    return load(some);
}

template <typename Stored>
LMX_FORCE void store_some(Floats x, Stored* at, int64_t count) {
    if (count >= LANES) return store(x, at);
    Stored some[LANES];
    store(x, some);
    std::memcpy(at, some, static_cast<size_t>(count) * sizeof(Stored));
}

LMX_FORCE float value_of(float x) { return x; }
LMX_FORCE float value_of(bf16 x) { return bf16_to_float(x); }
LMX_FORCE void set_value(float x, float* at) { *at = x; }
LMX_FORCE void set_value(float x, bf16* at) { *at = float_to_bf16(x); }

// a * b + c, rounded once where the CPU can.
LMX_FORCE Floats fused(Floats a, Floats b, Floats c) {
#if LMX_LANES == 16
    return _mm512_fmadd_ps(a, b, c);
#elif LMX_LANES == 8
    return _mm256_fmadd_ps(a, b, c);
#elif defined(LMX_NEON)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

LMX_FORCE float sum_of(Floats x) {
#if LMX_LANES == 16
    return _mm512_reduce_add_ps(x);
#else
    for (int64_t width = LANES / 2; width; width /= 2)
        for (int64_t i = 0; i < width; ++i) x[i] += x[i + width];
    return x[0];
#endif
}

LMX_FORCE Floats root_of(Floats x) {
#if LMX_LANES == 16
    return _mm512_sqrt_ps(x);
#elif LMX_LANES == 8
    return _mm256_sqrt_ps(x);
#else
    for (int64_t i = 0; i < LANES; ++i) x[i] = std::sqrt(x[i]);
    return x;
#endif
}

// 2^z to a relative error of 1.2e-7, exact at 0; overflows to infinity, underflows to 0, NaN stays NaN.
LMX_FORCE Floats exp2_of(Floats z) {
#if LMX_LANES == 16
    // 32 powers in two registers and a short polynomial between them: half the multiplications of a polynomial alone.
    // Adding 1.5 * 2^18, rounded down, leaves the number of the power in the lowest bits.
    alignas(64) static constexpr float powers[32] = {
        1.0f,         1.0218972f,   1.04427373f,  1.06714046f,  1.09050775f,  1.1143868f,   1.13878858f,  1.1637249f,
        1.18920708f,  1.21524739f,  1.24185777f,  1.26905096f,  1.29683959f,  1.32523668f,  1.35425556f,  1.38390994f,
        1.41421354f,  1.44518077f,  1.47682619f,  1.50916445f,  1.54221082f,  1.5759809f,   1.61049032f,  1.64575553f,
        1.68179286f,  1.71861935f,  1.75625217f,  1.79470909f,  1.8340081f,   1.87416768f,  1.91520655f,  1.95714414f};
    const __m512i place = _mm512_castps_si512(
        _mm512_add_round_ps(z, _mm512_set1_ps(393216.0f), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
    const __m512 power = _mm512_permutex2var_ps(_mm512_load_ps(powers), place, _mm512_load_ps(powers + 16));
    const __m512 r = _mm512_reduce_ps(z, 5 << 4 | _MM_FROUND_TO_NEG_INF);  // z - floor(32 z) / 32
    __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(0.2426527f), _mm512_set1_ps(0.69312376f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), power, power);
    return _mm512_scalef_ps(p, z);  // times 2^floor(z)
#else
    const Floats from = z < -127.0f ? spread(-127.0f) : z;
    const Floats within = from > 128.0f ? spread(128.0f) : from;
    const Floats place = within + 12582912.0f;  // 1.5 * 2^23: the nearest whole number stands in the lowest bits
    const Floats r = within - (place - 12582912.0f);
    Floats p = spread(0.0013264727f);
    p = fused(p, r, spread(0.009671513f));
    p = fused(p, r, spread(0.055507336f));
    p = fused(p, r, spread(0.24022243f));
    p = fused(p, r, spread(0.693147f));
    p = fused(p, r, spread(1.0f));
    return p * floats_of((words_of(place) << 23) + (127u << 23));
#endif
}

constexpr float LOG2_E = 1.44269504f;

LMX_FORCE Floats sigmoid_of(Floats x) { return 1.0f / (1.0f + exp2_of(x * -LOG2_E)); }

LMX_FORCE Floats silu_of(Floats x) { return x / (1.0f + exp2_of(x * -LOG2_E)); }

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|), and log1p(u) = 2 artanh(u / (2 + u)) by a polynomial good to 4e-9.
LMX_FORCE Floats softplus_of(Floats x) {
    const Floats away = x < 0 ? x : -x;
    const Floats u = exp2_of(away * LOG2_E), s = u / (2.0f + u), square = s * s;
    Floats p = spread(0.28178334f);
    p = fused(p, square, spread(0.27960604f));
    p = fused(p, square, spread(0.40024909f));
    p = fused(p, square, spread(0.66666317f));
    p = fused(p, square, spread(2.0f));
    return fused(p, s, x > 0 ? x : Floats{});
}

}  // namespace
}  // namespace lmx
