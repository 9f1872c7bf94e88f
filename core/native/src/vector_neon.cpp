// Matrices times a few vectors with NEON, in float.
#include "vector.h"

#if defined(LMX_NEON)

#define LMX_TARGET

namespace lmx {
namespace {

constexpr int64_t BYTES = UNIT / 2;

// Four-bit codes to floats: one table lookup for each of a float's four bytes, then zipped together.
struct Table {
    uint8x16_t bytes[4];
    explicit Table(const float* code) {
        uint8_t planes[4][16];
        for (int i = 0; i < 16; ++i) {
            uint32_t bits;
            std::memcpy(&bits, code + i, 4);
            for (int plane = 0; plane < 4; ++plane) planes[plane][i] = static_cast<uint8_t>(bits >> (8 * plane));
        }
        for (int plane = 0; plane < 4; ++plane) bytes[plane] = vld1q_u8(planes[plane]);
    }
    inline void operator()(uint8x16_t codes, float32x4_t (&out)[4]) const {
        uint8x16_t b[4];
        for (int plane = 0; plane < 4; ++plane) b[plane] = vqtbl1q_u8(bytes[plane], codes);
        const uint16x8_t low[] = {vreinterpretq_u16_u8(vzip1q_u8(b[0], b[1])), vreinterpretq_u16_u8(vzip2q_u8(b[0], b[1]))};
        const uint16x8_t high[] = {vreinterpretq_u16_u8(vzip1q_u8(b[2], b[3])), vreinterpretq_u16_u8(vzip2q_u8(b[2], b[3]))};
        for (int half = 0; half < 2; ++half) {
            out[2 * half] = vreinterpretq_f32_u16(vzip1q_u16(low[half], high[half]));
            out[2 * half + 1] = vreinterpretq_f32_u16(vzip2q_u16(low[half], high[half]));
        }
    }
};

template <int VECTORS>
void four_bit_row(const Matrix& m, const Vectors& x, int64_t row, float* out, int64_t out_stride, const Table& table) {
    const int64_t units = m.columns / UNIT, first_unit = row * units;
    const int shift = log2_of(m.block_size / UNIT);
    const float* vectors = static_cast<const float*>(x.data);
    float32x4_t sums[VECTORS];
    for (auto& sum : sums) sum = vdupq_n_f32(0);
    for (int64_t unit = 0; unit < units; ++unit) {
        const uint8_t* bytes = m.data + (first_unit + unit) * BYTES;
        float32x4_t parts[VECTORS][2];
        for (auto& part : parts) part[0] = part[1] = vdupq_n_f32(0);
        for (int sixteen = 0; sixteen < 2; ++sixteen) {
            const uint8x16_t packed = vld1q_u8(bytes + 16 * sixteen);
            float32x4_t even[4], odd[4];
            table(vshrq_n_u8(packed, 4), even);
            table(vandq_u8(packed, vdupq_n_u8(15)), odd);
            for (int v = 0; v < VECTORS; ++v) {
                const float* vector = vectors + v * x.stride + unit * UNIT + 16 * sixteen;
                for (int i = 0; i < 4; ++i) {
                    parts[v][0] = vfmaq_f32(parts[v][0], even[i], vld1q_f32(vector + 4 * i));
                    parts[v][1] = vfmaq_f32(parts[v][1], odd[i], vld1q_f32(vector + UNIT / 2 + 4 * i));
                }
            }
        }
        const float scale = block_scale(m, (first_unit + unit) >> shift);
        for (int v = 0; v < VECTORS; ++v) sums[v] = vfmaq_n_f32(sums[v], vaddq_f32(parts[v][0], parts[v][1]), scale);
    }
    for (int v = 0; v < VECTORS; ++v) out[v * out_stride] = vaddvq_f32(sums[v]);
}

template <Kind KIND>
constexpr int64_t element_size = KIND == INT8 ? 1 : KIND == KEPT_F32 ? 4 : 2;

// Four stored elements as floats.
template <Kind KIND>
inline float32x4_t load4(const uint8_t* at) {
    if constexpr (KIND == KEPT_F32) {
        return vreinterpretq_f32_u8(vld1q_u8(at));
    } else if constexpr (KIND == INT8) {
        int8_t bytes[8] = {};
        std::memcpy(bytes, at, 4);
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vld1_s8(bytes)))));
    } else if constexpr (KIND == KEPT_F16) {
        return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(at)));
    } else {
        return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(at)), 16));
    }
}

template <Kind KIND, int VECTORS>
void plain_row(const Matrix& m, const Vectors& x, int64_t row, float* out, int64_t out_stride) {
    constexpr int64_t size = element_size<KIND>;
    const float* vectors = static_cast<const float*>(x.data);
    const uint8_t* weights = m.data + row * m.columns * size;
    float32x4_t sums[VECTORS][4];
    for (auto& sum : sums)
        for (auto& part : sum) part = vdupq_n_f32(0);
    int64_t c = 0;
    for (; c + 16 <= m.columns; c += 16)
        for (int part = 0; part < 4; ++part) {
            const float32x4_t values = load4<KIND>(weights + (c + 4 * part) * size);
            for (int v = 0; v < VECTORS; ++v)
                sums[v][part] = vfmaq_f32(sums[v][part], values, vld1q_f32(vectors + v * x.stride + c + 4 * part));
        }
    for (; c < m.columns; c += 4) {  // the last few, copied so that nothing is read behind the matrix
        uint8_t last[16] = {};
        const int64_t left = m.columns - c < 4 ? m.columns - c : 4;
        std::memcpy(last, weights + c * size, static_cast<size_t>(left * size));
        const float32x4_t values = load4<KIND>(last);
        for (int v = 0; v < VECTORS; ++v)
            sums[v][0] = vfmaq_f32(sums[v][0], values, vld1q_f32(vectors + v * x.stride + c));
    }
    const float scale = KIND == INT8 ? static_cast<const float*>(m.absmax)[row] * INVERSE_127 : 1.0f;
    for (int v = 0; v < VECTORS; ++v) {
        const float32x4_t sum = vaddq_f32(vaddq_f32(sums[v][0], sums[v][1]), vaddq_f32(sums[v][2], sums[v][3]));
        out[v * out_stride] = scale * vaddvq_f32(sum);
    }
}

}  // namespace
}  // namespace lmx

#include "vector_path.h"

namespace lmx {

Kernel neon_kernel(Kind kind) { return kernel_of(kind); }

}  // namespace lmx

#endif
