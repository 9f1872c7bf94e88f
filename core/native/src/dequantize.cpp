// The values of quantized matrices, to the bit what torch makes of them: code times scale in float, then rounded.
#include <algorithm>

#include "lanes.h"
#include "prepare.h"
#include "scratch.h"

namespace lmx {
namespace {

constexpr int64_t STRETCH_OF_ROW = 1024;

// Both codes of every byte, and what else a matrix is decoded with: made once for many rows.
struct Decoder {
    const Matrix& m;
    float pairs[256][2];
    int shift;

    explicit Decoder(const Matrix& matrix) : m(matrix), shift(log2_of(matrix.block_size)) {
        if (m.kind != FOUR_BIT) return;
        for (int byte = 0; byte < 256; ++byte) {
            pairs[byte][0] = m.code[byte >> 4];
            pairs[byte][1] = m.code[byte & 15];
        }
    }
};

// Elements first .. last of the flattened matrix, within one block and from an even one on.
void decode_block(const Decoder& d, int64_t first, int64_t last, float scale, float* out) {
    const uint8_t* bytes = d.m.data + first / 2;
    for (int64_t i = 0; i < (last - first) / 2; ++i) {
        out[2 * i] = d.pairs[bytes[i]][0] * scale;
        out[2 * i + 1] = d.pairs[bytes[i]][1] * scale;
    }
    if ((last - first) & 1) out[last - first - 1] = d.pairs[bytes[(last - first) / 2]][0] * scale;
}

#if defined(LMX_X86)
LMX_AVX512 void decode_block_avx512(const Decoder& d, int64_t first, int64_t last, float scale, float* out) {
    const __m512 table = _mm512_loadu_ps(d.m.code), scales = _mm512_set1_ps(scale);
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    int64_t at = first;
    for (; at + 32 <= last; at += 32, out += 32) {
        const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(d.m.data + at / 2)));
        const __m512 even = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), table), scales);
        const __m512 odd = _mm512_mul_ps(_mm512_permutexvar_ps(codes, table), scales);
        _mm512_storeu_ps(out, _mm512_permutex2var_ps(even, low, odd));
        _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(even, high, odd));
    }
    decode_block(d, at, last, scale, out);
}
#endif

using BlockFunction = void (*)(const Decoder&, int64_t, int64_t, float, float*);

BlockFunction block_function() {
#if defined(LMX_X86)
    if (has_avx512()) return decode_block_avx512;
#endif
    return decode_block;
}

// Elements first .. last of the flattened matrix; blocks may begin and end anywhere.
void four_bit_values(const Decoder& d, int64_t first, int64_t last, float* out) {
    const BlockFunction decode = block_function();
    for (int64_t at = first; at < last;) {
        const float scale = block_scale(d.m, at >> d.shift);
        if (at & 1) {
            *out++ = d.pairs[d.m.data[at / 2]][1] * scale;
            ++at;
            continue;
        }
        const int64_t stop = std::min(last, ((at >> d.shift) + 1) << d.shift);
        decode(d, at, stop, scale, out);
        out += stop - at;
        at = stop;
    }
}

void values_of(const Decoder& d, int64_t row, int64_t first, int64_t last, float* out) {
    const Matrix& m = d.m;
    const int64_t start = row * m.columns;
    if (m.kind == FOUR_BIT) return four_bit_values(d, start + first, start + last, out);
    // torch multiplies by the scale first, then by the constant: in this order.
    const float scale = static_cast<const float*>(m.absmax)[row];
    const auto* bytes = reinterpret_cast<const int8_t*>(m.data);
    for (int64_t c = first; c < last; ++c) out[c - first] = static_cast<float>(bytes[start + c]) * scale * INVERSE_127;
}

}  // namespace
}  // namespace lmx

using namespace lmx;

// out [last - first, columns] of dtype: the rows first .. last of a quantized matrix.
LMX_EXPORT void lmx_dequantize(const Matrix* m, int64_t first, int64_t last, int dtype, void* out) {
    const Dtype type = static_cast<Dtype>(dtype);
    parallel_for(last - first, 8, [&](int64_t begin, int64_t end) {
        const Decoder decoder(*m);
        alignas(64) float values[STRETCH_OF_ROW];
        for (int64_t row = begin; row < end; ++row)
            for (int64_t c = 0; c < m->columns; c += STRETCH_OF_ROW) {
                const int64_t stop = std::min(c + STRETCH_OF_ROW, m->columns);
                values_of(decoder, first + row, c, stop, values);
                store(values, stop - c, type, static_cast<uint8_t*>(out) + (row * m->columns + c) * size_of(type));
            }
    });
}

// The sum of (value - source)^2 over a quantized matrix and what it was made of, [rows, columns] of dtype.
LMX_EXPORT double lmx_squared_error(const Matrix* m, const void* source, int dtype) {
    constexpr int64_t ROWS = 8;  // whose sum is one number, whatever the threads
    const Dtype type = static_cast<Dtype>(dtype);
    const int64_t parts = (m->rows + ROWS - 1) / ROWS;
    Scratch<double> sums(parts);
    double* each = sums.data();
    parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
        const Decoder decoder(*m);
        alignas(64) float values[STRETCH_OF_ROW];
        for (int64_t part = begin; part < end; ++part) {
            each[part] = 0;
            for (int64_t row = part * ROWS; row < std::min((part + 1) * ROWS, m->rows); ++row)
                for (int64_t c = 0; c < m->columns; c += STRETCH_OF_ROW) {
                    const int64_t stop = std::min(c + STRETCH_OF_ROW, m->columns);
                    values_of(decoder, row, c, stop, values);
                    const auto* x = static_cast<const uint8_t*>(source) + (row * m->columns + c) * size_of(type);
                    each[part] += lanes().squares(values, x, type, stop - c);
                }
        }
    });
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += each[part];
    return sum;
}
