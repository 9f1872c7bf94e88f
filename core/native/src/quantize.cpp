// Quantizing in the two formats of bitsandbytes: what is cut into parts for threads, and what is too little to cut.
#include <algorithm>
#include <cmath>

#include "lanes.h"

namespace lmx {
namespace {

// Elements that are worth a thread.
constexpr int64_t GRAIN = 1 << 15;
constexpr int64_t NESTED_BLOCK = 256;

int rank_of(float x, const float* thresholds) {
    return static_cast<int>(std::lower_bound(thresholds, thresholds + RANKS - 1, x) - thresholds);
}

// The last block, where it is not whole, is really divided by its absmax, which is never zero. `x` [count].
void four_bit_tail(const FourBit& q, const float* x, int64_t count, float* absmax, uint8_t* packed) {
    float largest = 0;
    for (int64_t i = 0; i < count; ++i)
        if (!(std::fabs(x[i]) <= largest) && !std::isnan(largest)) largest = std::fabs(x[i]);
    *absmax = largest < SMALLEST_ABSMAX ? SMALLEST_ABSMAX : largest;
    for (int64_t i = 0; i < count; i += 2) {
        const int first = rank_of(x[i] / *absmax, q.thresholds);
        const int second = rank_of(i + 1 < count ? x[i + 1] / *absmax : 0.0f, q.thresholds);
        const int byte = first << 4 | second;
        packed[i / 2] = q.codes ? q.codes[byte] : static_cast<uint8_t>(byte);
    }
}

void scale_block(const float* x, int64_t count, const uint8_t* nearest, uint8_t* codes, float* absmax) {
    float largest = 0;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(x[i]));
    const float inverse = 1.0f / largest;
    for (int64_t i = 0; i < count; ++i) {
        const float scaled = x[i] * inverse;  // no number where a denormal's reciprocal overflows: step 0
        const float step = (std::min(std::max(scaled, -1.0f), 1.0f) + 1.0f) * 0.5f * 65535.0f + 0.5f;
        codes[i] = largest > 0 ? nearest[std::isnan(scaled) ? 0 : static_cast<int>(step)] : 0;
    }
    *absmax = largest;
}

}  // namespace
}  // namespace lmx

using namespace lmx;

// x [count] of dtype -> packed [(count + 1) / 2], absmax [blocks] of whole blocks and at last one that may be shorter,
// given in float as `tail` too. thresholds [15]: between the values in their order; codes [256]: see FourBit.
LMX_EXPORT void lmx_quantize_4bit(const void* x, int dtype, int64_t count, int64_t block_size, const float* thresholds,
                                  const uint8_t* codes, const float* tail, uint8_t* packed, float* absmax) {
    const FourBit q{x, block_size, thresholds, codes, packed, absmax};
    const int64_t blocks = count / block_size, whole = blocks * block_size;
    const Lanes& path = lanes();
    parallel_for(blocks, std::max<int64_t>(1, GRAIN / block_size), [&](int64_t first, int64_t last) {
        path.four_bit(q, static_cast<Dtype>(dtype), first, last);
    });
    if (whole < count) four_bit_tail(q, tail, count - whole, absmax + blocks, packed + whole / 2);
}

// x [rows, columns] of dtype -> weight int8 [rows, columns], absmax [rows].
LMX_EXPORT void lmx_quantize_int8(const void* x, int dtype, int64_t rows, int64_t columns, uint8_t* weight,
                                  float* absmax) {
    const Int8 q{x, columns, weight, absmax};
    const Lanes& path = lanes();
    parallel_for(rows, 1 + GRAIN / columns, [&](int64_t first, int64_t last) {
        path.int8(q, static_cast<Dtype>(dtype), first, last);
    });
}

// x [count] -> codes [count] by the nearest of 65536 steps between -1 and 1, and the absmax of each 256.
LMX_EXPORT void lmx_quantize_scales(const float* x, int64_t count, const uint8_t* nearest, uint8_t* codes,
                                    float* absmax) {
    const int64_t blocks = (count + NESTED_BLOCK - 1) / NESTED_BLOCK;
    parallel_for(blocks, GRAIN / NESTED_BLOCK, [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; ++block) {
            const int64_t at = block * NESTED_BLOCK;
            scale_block(x + at, std::min(NESTED_BLOCK, count - at), nearest, codes + at, absmax + block);
        }
    });
}

// Whether every one of x [count] is a number of bf16.
LMX_EXPORT int lmx_are_bf16(const uint32_t* x, int64_t count) {
    uint32_t below = 0;
    for (int64_t i = 0; i < count; ++i) below |= x[i] & 0xffff;
    return below == 0;
}

// x [count], of which `lmx_are_bf16` is true -> out [count].
LMX_EXPORT void lmx_to_bf16(const uint32_t* x, int64_t count, bf16* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<bf16>(x[i] >> 16);
}
