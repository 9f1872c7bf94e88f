// Conversions between layouts and dtypes: loops that a compiler turns into vector code, once for each instruction set.
#include "prepare.h"

#include <algorithm>

#include "digits.h"
#include "exponential.h"

namespace lmx {
namespace {

LMX_INLINE float half_to_float(uint16_t half) {
    // Exponents are 112 apart; multiplying does the same for subnormal numbers.
    const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fff) << 13;
    float value;
    std::memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((half & 0x7c00) == 0x7c00) bits = 0x7f800000u | magnitude;
    bits |= static_cast<uint32_t>(half & 0x8000) << 16;
    std::memcpy(&value, &bits, 4);
    return value;
}

LMX_INLINE uint16_t float_to_half(float value) {
    // Round to nearest even, as torch does: by an addition that pushes the surplus bits out (subnormal numbers too).
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (magnitude >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);
    if (magnitude < 0x38800000) {
        float small;
        std::memcpy(&small, &magnitude, 4);
        small += 0.5f;
        std::memcpy(&bits, &small, 4);
        return static_cast<uint16_t>(sign | (bits - 0x3f000000));
    }
    return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

template <Dtype DTYPE>
LMX_INLINE float load(const void* x, int64_t i) {
    if constexpr (DTYPE == F32) return static_cast<const float*>(x)[i];
    const uint16_t half = static_cast<const uint16_t*>(x)[i];
    return DTYPE == BF16 ? bf16_to_float(half) : half_to_float(half);
}

template <Layout LAYOUT>
LMX_INLINE void put(void* out, int64_t i, float value) {
    if constexpr (LAYOUT == PLAIN_F32 || LAYOUT == SPLIT_F32) static_cast<float*>(out)[i] = value;
    else static_cast<bf16*>(out)[i] = float_to_bf16(value);
}

// Which element of its group of `GROUP` stands at place i: the layouts take every second or every fourth.
template <Layout LAYOUT>
constexpr int64_t GROUP = LAYOUT == QUARTERED_BF16 ? 2 * UNIT : UNIT;

template <Layout LAYOUT>
LMX_INLINE int64_t element_at(int64_t i) {
    if constexpr (LAYOUT == SPLIT_F32 || LAYOUT == SPLIT_BF16) return 2 * (i % 32) + i / 32;
    if constexpr (LAYOUT == QUARTERED_BF16) return 4 * (i % 32) + (i / 32 ^ 1);
    return i;
}

template <Dtype DTYPE, Layout LAYOUT>
LMX_INLINE void prepare_as(const void* x, int64_t columns, void* out) {
    constexpr int64_t group = GROUP<LAYOUT>;
    const int64_t whole = columns / group * group;
    for (int64_t start = 0; start < whole; start += group)
        for (int64_t quarter = 0; quarter < group; quarter += 32)
            for (int64_t i = quarter; i < quarter + 32; ++i)
                put<LAYOUT>(out, start + i, load<DTYPE>(x, start + element_at<LAYOUT>(i)));
    if (whole == columns) return;
    for (int64_t i = 0; i < group; ++i) {
        const int64_t from = whole + element_at<LAYOUT>(i);
        put<LAYOUT>(out, whole + i, from < columns ? load<DTYPE>(x, from) : 0.0f);
    }
}

template <Dtype DTYPE>
LMX_INLINE void prepare_from(const void* x, int64_t columns, Layout layout, void* out) {
    switch (layout) {
        case PLAIN_F32: return prepare_as<DTYPE, PLAIN_F32>(x, columns, out);
        case SPLIT_F32: return prepare_as<DTYPE, SPLIT_F32>(x, columns, out);
        case PLAIN_BF16: return prepare_as<DTYPE, PLAIN_BF16>(x, columns, out);
        case SPLIT_BF16: return prepare_as<DTYPE, SPLIT_BF16>(x, columns, out);
        default: return prepare_as<DTYPE, QUARTERED_BF16>(x, columns, out);
    }
}

LMX_INLINE void prepare_any(const void* x, Dtype dtype, int64_t columns, Layout layout, void* out) {
    if (dtype == F32) prepare_from<F32>(x, columns, layout, out);
    else if (dtype == BF16) prepare_from<BF16>(x, columns, layout, out);
    else prepare_from<F16>(x, columns, layout, out);
}

LMX_INLINE void store_any(const float* values, int64_t count, Dtype dtype, void* out) {
    if (dtype == F32) {
        std::memcpy(out, values, static_cast<size_t>(count) * 4);
    } else if (dtype == BF16) {
        for (int64_t i = 0; i < count; ++i) static_cast<bf16*>(out)[i] = float_to_bf16(values[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(out)[i] = float_to_half(values[i]);
    }
}

LMX_INLINE void gate_any(float* gate, const float* up, int64_t count, Activation activation) {
    switch (activation) {
        case SILU:
            for (int64_t i = 0; i < count; ++i) gate[i] = silu(gate[i]) * up[i];
            break;
        case GELU_TANH:
            for (int64_t i = 0; i < count; ++i) gate[i] = gelu_tanh(gate[i]) * up[i];
            break;
        case GELU:
            for (int64_t i = 0; i < count; ++i)
                gate[i] = 0.5f * gate[i] * (1.0f + std::erf(gate[i] * 0.70710678f)) * up[i];
            break;
        default:
            for (int64_t i = 0; i < count; ++i) gate[i] = (gate[i] < 0 ? 0 : gate[i]) * up[i];
    }
}

// The same loops under each set of instructions.
#if defined(LMX_X86)
// 64 words of bf16 split, or 128 quartered: compilers move them one by one. Neighbours are one number of 32 or 64 bits.
LMX_AVX512 LMX_INLINE void put_split(const bf16* x, bf16* out) {
    for (int64_t i = 0; i < UNIT; i += 32) {
        const __m512i pairs = _mm512_loadu_si512(x + i), odd = _mm512_srli_epi32(pairs, 16);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i / 2), _mm512_cvtepi32_epi16(pairs));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + UNIT / 2 + i / 2), _mm512_cvtepi32_epi16(odd));
    }
}

LMX_AVX512 LMX_INLINE void put_quartered(const bf16* x, bf16* out) {
    for (int64_t i = 0; i < 2 * UNIT; i += 32) {
        const __m512i fours = _mm512_loadu_si512(x + i);
        for (int at = 0; at < 4; ++at) {
            const __m512i moved = _mm512_srl_epi64(fours, _mm_cvtsi32_si128(16 * at));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 32 * (at ^ 1) + i / 4), _mm512_cvtepi64_epi16(moved));
        }
    }
}

template <Layout LAYOUT>
LMX_AVX512 LMX_INLINE void rearrange(const void* x, Dtype dtype, int64_t columns, bf16* out) {
    for (int64_t c = 0; c < columns; c += GROUP<LAYOUT>) {
        alignas(64) bf16 rounded[GROUP<LAYOUT>] = {};
        const auto* at = reinterpret_cast<const bf16*>(static_cast<const uint8_t*>(x) + c * size_of(dtype));
        const int64_t count = std::min(GROUP<LAYOUT>, columns - c);
        if (dtype != BF16 || count < GROUP<LAYOUT>) {
            prepare_any(at, dtype, count, PLAIN_BF16, rounded);
            at = rounded;
        }
        if constexpr (LAYOUT == SPLIT_BF16) put_split(at, out + c);
        else put_quartered(at, out + c);
    }
}

LMX_AVX512 void prepare_avx512(const void* x, Dtype dtype, int64_t columns, Layout layout, void* out) {
    if (layout == SPLIT_BF16) return rearrange<SPLIT_BF16>(x, dtype, columns, static_cast<bf16*>(out));
    if (layout == QUARTERED_BF16) return rearrange<QUARTERED_BF16>(x, dtype, columns, static_cast<bf16*>(out));
    if (!is_paired(layout)) return prepare_any(x, dtype, columns, layout, out);
    for (int64_t c = 0; c < columns; c += STRETCH) {
        alignas(64) float values[STRETCH] = {};
        const auto* at = static_cast<const uint8_t*>(x) + c * size_of(dtype);
        prepare_any(at, dtype, std::min(STRETCH, columns - c), PLAIN_F32, values);
        if (layout == DIGITS) put_digit_pair(values, static_cast<DigitPair*>(out)[c / STRETCH]);
        else put_whole_pair(values, static_cast<WholePair*>(out)[c / STRETCH]);
    }
}
LMX_AVX2 void prepare_avx2(const void* x, Dtype dtype, int64_t columns, Layout layout, void* out) {
    prepare_any(x, dtype, columns, layout, out);
}
LMX_AVX512 void store_avx512(const float* values, int64_t count, Dtype dtype, void* out) {
    store_any(values, count, dtype, out);
}
LMX_AVX2 void store_avx2(const float* values, int64_t count, Dtype dtype, void* out) {
    store_any(values, count, dtype, out);
}
LMX_AVX512 void gate_avx512(float* gate, const float* up, int64_t count, Activation activation) {
    gate_any(gate, up, count, activation);
}
LMX_AVX2 void gate_avx2(float* gate, const float* up, int64_t count, Activation activation) {
    gate_any(gate, up, count, activation);
}
#endif

}  // namespace

void prepare(const void* x, Dtype dtype, int64_t columns, Layout layout, void* out) {
#if defined(LMX_X86)
    if (has_avx512()) return prepare_avx512(x, dtype, columns, layout, out);
    if (level() == AVX2) return prepare_avx2(x, dtype, columns, layout, out);
#endif
    prepare_any(x, dtype, columns, layout, out);
}

void store(const float* values, int64_t count, Dtype dtype, void* out) {
#if defined(LMX_X86)
    if (has_avx512()) return store_avx512(values, count, dtype, out);
    if (level() == AVX2) return store_avx2(values, count, dtype, out);
#endif
    store_any(values, count, dtype, out);
}

void gate_with(float* gate, const float* up, int64_t count, Activation activation) {
#if defined(LMX_X86)
    if (has_avx512()) return gate_avx512(gate, up, count, activation);
    if (level() == AVX2) return gate_avx2(gate, up, count, activation);
#endif
    gate_any(gate, up, count, activation);
}

}  // namespace lmx
