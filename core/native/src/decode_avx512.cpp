// Rows of a matrix as bf16, with AVX-512.
#include "decode.h"

#include <algorithm>

#include "prepare.h"

#if defined(LMX_X86)

namespace lmx {
namespace {

constexpr int64_t PAIR = 2 * UNIT;
// Rows between the one that is decoded and the one that memory is asked for.
constexpr int64_t AHEAD = 8;

// Writes `count` elements a step at a time, `stride` elements from the last, and zeros up to a whole pair of units.
LMX_AVX512 void put_quartered(const bf16* x, int64_t count, int64_t stride, bf16* out) {
    for (int64_t c = 0; c < count; c += PAIR) {
        const Quarters quarters = quartered(x + c, count - c);
        for (int i = 0; i < 4; ++i) _mm512_storeu_si512(out + (c / STEP + i) * stride, quarters.part[i]);
    }
}

// The functions below decode the columns first .. last of a row. Like put_quartered they write steps that lie `stride`
// elements apart, and zeros at the end.

// Whole units, and blocks of at least one: a word holds four codes of a block.
LMX_AVX512 void decode_four_bit(const Matrix& m, int64_t row, int64_t first, int64_t last, int64_t stride, bf16* out) {
    const __m512 code = _mm512_loadu_ps(m.code);
    const __m512i nibble = _mm512_set1_epi16(15);
    const __m512i upper = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    const int shift = log2_of(m.block_size);
    const int64_t ahead = AHEAD * m.columns / 2;
    for (int64_t at = row * m.columns + first, end = row * m.columns + last; at < end; at += PAIR, out += 4 * stride) {
        const uint8_t* bytes = m.data + at / 2;
        _mm_prefetch(reinterpret_cast<const char*>(bytes + ahead), _MM_HINT_T1);
        const bool whole = at + PAIR <= end;
        const __m512i words = whole ? _mm512_loadu_si512(bytes)
                                    : _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
        const float low = block_scale(m, at >> shift), high = whole ? block_scale(m, (at + UNIT) >> shift) : 0.0f;
        // The values of either unit's codes: 16 for the lower half of the words, 16 for the upper.
        const __m512i values = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(code, _mm512_set1_ps(high)),
                                                            _mm512_mul_ps(code, _mm512_set1_ps(low)));
        const __m512i parts[] = {words, _mm512_srli_epi16(words, 4), _mm512_srli_epi16(words, 8),
                                 _mm512_srli_epi16(words, 12)};
        for (int i = 0; i < 4; ++i) {
            const __m512i codes = _mm512_ternarylogic_epi32(parts[i], nibble, upper, 0xea);  // part & nibble | upper
            _mm512_storeu_si512(out + i * stride, _mm512_permutexvar_epi16(codes, values));
        }
    }
}

// int8 is exact in bf16; its scale waits for the sum.
LMX_AVX512 void decode_int8(const Matrix& m, int64_t row, int64_t first, int64_t last, int64_t stride, bf16* out) {
    const auto* bytes = reinterpret_cast<const int8_t*>(m.data) + row * m.columns;
    alignas(64) bf16 values[PAIR];
    for (int64_t c = first; c < last; c += PAIR, out += 4 * stride) {
        const int64_t count = std::min(PAIR, last - c);
        int64_t i = 0;
        for (; i + STEP <= count; i += STEP) {
            const auto* at = reinterpret_cast<const __m128i*>(bytes + c + i);
            const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at)));
            const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at + 1)));
            _mm512_store_si512(values + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
        for (; i < count; ++i) values[i] = float_to_bf16(bytes[c + i]);
        put_quartered(values, count, stride, out);
    }
}

// Any matrix, one element after the other but for 16-bit floats.
LMX_AVX512 void decode_any(const Matrix& m, int64_t row, int64_t first, int64_t last, int64_t stride, bf16* out) {
    const int64_t start = row * m.columns + first, count = last - first;
    if (m.kind == KEPT_BF16) return put_quartered(reinterpret_cast<const bf16*>(m.data) + start, count, stride, out);
    alignas(64) bf16 values[DEPTH];
    if (m.kind == FOUR_BIT) {
        const int shift = log2_of(m.block_size);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t at = start + i;
            const uint8_t byte = m.data[at >> 1];
            values[i] = float_to_bf16(m.code[at & 1 ? byte & 15 : byte >> 4] * block_scale(m, at >> shift));
        }
    } else {
        const Dtype dtype = m.kind == KEPT_F32 ? F32 : F16;
        alignas(64) bf16 padded_values[DEPTH + STRETCH];
        prepare(m.data + start * size_of(dtype), dtype, count, PLAIN_BF16, padded_values);
        std::memcpy(values, padded_values, static_cast<size_t>(count) * 2);
    }
    put_quartered(values, count, stride, out);
}

using DecodeFunction = void (*)(const Matrix&, int64_t, int64_t, int64_t, int64_t, bf16*);

DecodeFunction decode_function(const Matrix& m) {
    if (m.kind == INT8) return decode_int8;
    return m.kind == FOUR_BIT && m.columns % UNIT == 0 && m.block_size >= UNIT ? decode_four_bit : decode_any;
}

}  // namespace

void decode_rows(const Matrix& m, int64_t first, int64_t last, int64_t start, int64_t stop, int64_t together,
                 bf16* weights) {
    const DecodeFunction decode = decode_function(m);
    const int64_t depth = packed_columns(stop - start);
    const auto place = [&](int64_t at) { return weights + at / together * together * depth + at % together * STEP; };
    for (int64_t row = first; row < last; ++row) decode(m, row, start, stop, together * STEP, place(row - first));
    for (int64_t at = last - first; at % together; ++at)
        for (int64_t c = 0; c < depth; c += STEP) std::memset(place(at) + c * together, 0, STEP * sizeof(bf16));
}

}  // namespace lmx

#endif
