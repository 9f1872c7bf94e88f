// Matrices times a few vectors in plain C++: any CPU, any shape, and the oracle's arithmetic in float32.
#include "vector.h"

namespace lmx {

static inline float half_to_float(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 31, fraction = half & 1023;
    uint32_t bits;
    float out;
    if (exponent == 31) {
        bits = sign | 0x7f800000u | (fraction << 13);
    } else if (exponent) {
        bits = sign | ((exponent + 112) << 23) | (fraction << 13);
    } else {
        out = static_cast<float>(fraction) * 0x1p-24f;
        return sign ? -out : out;
    }
    std::memcpy(&out, &bits, 4);
    return out;
}

static void four_bit(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t out_stride) {
    const float* vectors = static_cast<const float*>(x.data);
    const int shift = log2_of(m.block_size);
    for (int64_t row = first; row < last; ++row) {
        float sums[MAX_VECTORS] = {};
        // A block may begin in one row and end in the next.
        for (int64_t column = 0; column < m.columns;) {
            const int64_t element = row * m.columns + column, block = element >> shift;
            int64_t stop = ((block + 1) << shift) - row * m.columns;
            if (stop > m.columns) stop = m.columns;
            float parts[MAX_VECTORS] = {};
            for (; column < stop; ++column) {
                const int64_t at = row * m.columns + column;
                const float value = m.code[at & 1 ? m.data[at >> 1] & 15 : m.data[at >> 1] >> 4];
                for (int64_t v = 0; v < x.count; ++v) parts[v] += value * vectors[v * x.stride + column];
            }
            const float scale = block_scale(m, block);
            for (int64_t v = 0; v < x.count; ++v) sums[v] += parts[v] * scale;
        }
        for (int64_t v = 0; v < x.count; ++v) out[v * out_stride + row - first] = sums[v];
    }
}

template <typename Stored, float value_of(Stored)>
static void plain(const Matrix& m, const Vectors& x, int64_t first, int64_t last, float* out, int64_t out_stride) {
    const float* vectors = static_cast<const float*>(x.data);
    for (int64_t row = first; row < last; ++row) {
        const uint8_t* weights = m.data + row * m.columns * static_cast<int64_t>(sizeof(Stored));
        const float scale = m.kind == INT8 ? static_cast<const float*>(m.absmax)[row] * INVERSE_127 : 1.0f;
        for (int64_t v = 0; v < x.count; ++v) {
            float sums[16] = {};  // independent sums, which a compiler can keep in vector registers
            for (int64_t c = 0; c < m.columns; ++c) {
                Stored stored;
                std::memcpy(&stored, weights + c * static_cast<int64_t>(sizeof(Stored)), sizeof(Stored));
                sums[c & 15] += value_of(stored) * vectors[v * x.stride + c];
            }
            float sum = 0;
            for (float part : sums) sum += part;
            out[v * out_stride + row - first] = sum * scale;
        }
    }
}

static inline float of_int8(int8_t value) { return value; }
static inline float of_float(float value) { return value; }

Kernel portable_kernel(Kind kind) {
    switch (kind) {
        case FOUR_BIT: return {PLAIN_F32, four_bit};
        case INT8: return {PLAIN_F32, plain<int8_t, of_int8>};
        case KEPT_BF16: return {PLAIN_F32, plain<bf16, bf16_to_float>};
        case KEPT_F16: return {PLAIN_F32, plain<uint16_t, half_to_float>};
        default: return {PLAIN_F32, plain<float, of_float>};
    }
}

}  // namespace lmx
