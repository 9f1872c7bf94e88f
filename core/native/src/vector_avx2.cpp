// Matrices times a few vectors with AVX2 and FMA, in float.
#include "vector.h"

#if defined(LMX_X86)

#define LMX_TARGET LMX_AVX2

namespace lmx {
namespace {

constexpr int64_t BYTES = UNIT / 2;

LMX_AVX2 inline float sum_of(__m256 x) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// Four-bit codes to values: the table's halves by the low three bits, chosen between by the fourth. Bits above do not
// matter, so that the low nibble needs no mask.
struct Table {
    __m256 low, high;
    LMX_AVX2 explicit Table(const float* code) : low(_mm256_loadu_ps(code)), high(_mm256_loadu_ps(code + 8)) {}
    LMX_AVX2 inline __m256 operator()(__m256i codes) const {
        const __m256 fourth = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes), fourth);
    }
};

template <int VECTORS>
LMX_AVX2 void four_bit_row(const Matrix& m, const Vectors& x, int64_t row, float* out, int64_t out_stride,
                           const Table& table) {
    const int64_t units = m.columns / UNIT, first_unit = row * units;
    const int shift = log2_of(m.block_size / UNIT);
    const float* vectors = static_cast<const float*>(x.data);
    __m256 sums[VECTORS];
    for (auto& sum : sums) sum = _mm256_setzero_ps();
    for (int64_t unit = 0; unit < units; ++unit) {
        const uint8_t* bytes = m.data + (first_unit + unit) * BYTES;
        __m256 parts[VECTORS][2];
        for (auto& part : parts) part[0] = part[1] = _mm256_setzero_ps();
        for (int eight = 0; eight < 4; ++eight) {
            const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + 8 * eight));
            const __m256i pairs = _mm256_cvtepu8_epi32(packed);
            const __m256 even = table(_mm256_srli_epi32(pairs, 4)), odd = table(pairs);
            for (int v = 0; v < VECTORS; ++v) {
                const float* vector = vectors + v * x.stride + unit * UNIT + 8 * eight;
                parts[v][0] = _mm256_fmadd_ps(even, _mm256_loadu_ps(vector), parts[v][0]);
                parts[v][1] = _mm256_fmadd_ps(odd, _mm256_loadu_ps(vector + UNIT / 2), parts[v][1]);
            }
        }
        const __m256 scale = _mm256_set1_ps(block_scale(m, (first_unit + unit) >> shift));
        for (int v = 0; v < VECTORS; ++v)
            sums[v] = _mm256_fmadd_ps(_mm256_add_ps(parts[v][0], parts[v][1]), scale, sums[v]);
    }
    for (int v = 0; v < VECTORS; ++v) out[v * out_stride] = sum_of(sums[v]);
}

template <Kind KIND>
constexpr int64_t element_size = KIND == INT8 ? 1 : KIND == KEPT_F32 ? 4 : 2;

// Eight stored elements as floats.
template <Kind KIND>
LMX_AVX2 inline __m256 load8(const uint8_t* at) {
    if constexpr (KIND == KEPT_F32) return _mm256_loadu_ps(reinterpret_cast<const float*>(at));
    if constexpr (KIND == INT8) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    }
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    if constexpr (KIND == KEPT_F16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

template <Kind KIND, int VECTORS>
LMX_AVX2 void plain_row(const Matrix& m, const Vectors& x, int64_t row, float* out, int64_t out_stride) {
    constexpr int64_t size = element_size<KIND>;
    const float* vectors = static_cast<const float*>(x.data);
    const uint8_t* weights = m.data + row * m.columns * size;
    __m256 sums[VECTORS][2];
    for (auto& sum : sums) sum[0] = sum[1] = _mm256_setzero_ps();
    int64_t c = 0;
    for (; c + 16 <= m.columns; c += 16)
        for (int part = 0; part < 2; ++part) {
            const __m256 values = load8<KIND>(weights + (c + 8 * part) * size);
            for (int v = 0; v < VECTORS; ++v) {
                const __m256 vector = _mm256_loadu_ps(vectors + v * x.stride + c + 8 * part);
                sums[v][part] = _mm256_fmadd_ps(values, vector, sums[v][part]);
            }
        }
    for (; c < m.columns; c += 8) {  // the last few, copied so that nothing is read behind the matrix
        uint8_t last[32] = {};
        const int64_t left = m.columns - c < 8 ? m.columns - c : 8;
        std::memcpy(last, weights + c * size, static_cast<size_t>(left * size));
        const __m256 values = load8<KIND>(last);
        for (int v = 0; v < VECTORS; ++v)
            sums[v][0] = _mm256_fmadd_ps(values, _mm256_loadu_ps(vectors + v * x.stride + c), sums[v][0]);
    }
    const float scale = KIND == INT8 ? static_cast<const float*>(m.absmax)[row] * INVERSE_127 : 1.0f;
    for (int v = 0; v < VECTORS; ++v) out[v * out_stride] = scale * sum_of(_mm256_add_ps(sums[v][0], sums[v][1]));
}

}  // namespace
}  // namespace lmx

#include "vector_path.h"

namespace lmx {

Kernel avx2_kernel(Kind kind) { return kernel_of(kind); }

}  // namespace lmx

#endif
