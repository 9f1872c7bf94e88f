// Matrices times a few vectors, each as if alone: what the paths for the different CPUs share.
#pragma once

#include "lmx_native.h"

namespace lmx {

// How the elements of a matrix lie in memory. The 16-bit and 32-bit kinds are matrices that were not quantized.
enum Kind : int64_t { FOUR_BIT = 0, INT8 = 1, KEPT_BF16 = 2, KEPT_F32 = 3, KEPT_F16 = 4 };

// One row of the int64 table that Python hands over (core/native/vector.py).
struct Matrix {
    const uint8_t* data;
    int64_t rows, columns;
    Kind kind;
    // four-bit: float or bf16 a block, or its uint8 code where `nested_map` is there; int8: float a row
    const void* absmax;
    const float* code;   // four-bit: the values of the 16 codes, 16 bf16 close to them times a factor, 1 / factor
    int64_t absmax_dtype;  // of four-bit blocks, where there is no `nested_map`
    int64_t block_size;    // a power of two
    const float* nested_map;     // [256], or null
    const float* nested_absmax;  // one for 256 blocks
    union {
        int64_t offset_bits;
        float nested_offset;
    };
};
constexpr int64_t MATRIX_WORDS = 11;
static_assert(sizeof(Matrix) == MATRIX_WORDS * 8, "as the table in Python");

// The gate, up and down matrices of an expert.
using Expert = Matrix[3];

inline const bf16* rounded_code(const Matrix& m) { return reinterpret_cast<const bf16*>(m.code + 16); }
inline float code_scale(const Matrix& m) { return m.code[24]; }
// Of the values in digits (digits.h): the coarse ones [16], the fine ones [16], and what their products are multiplied by.
inline const uint8_t* code_digits(const Matrix& m) { return reinterpret_cast<const uint8_t*>(m.code + 25); }
inline float digit_scale(const Matrix& m) { return m.code[33]; }

constexpr int MAX_VECTORS = 4;
// Elements that a kernel takes at a time.
constexpr int64_t UNIT = 64;

// How vectors are laid out for a kernel. Split: in each unit, first its 32 even elements, then its 32 odd ones, as the
// high and the low nibbles of 32 bytes meet them. Quartered: in each two units, those elements that lie lowest in a word
// of four codes, then the others by rising bits, which is 1, 5, 9 ..., then 0, 4 ..., 3, 7 ... and 2, 6 ... Whole: 16-bit
// whole numbers, two units of them with their scale (WholePair, whole.h). Digits: two of eight bits (DigitPair, digits.h).
enum Layout : int {
    PLAIN_F32 = 0,
    SPLIT_F32 = 1,
    PLAIN_BF16 = 2,
    SPLIT_BF16 = 3,
    QUARTERED_BF16 = 4,
    PLAIN_WHOLE = 5,
    DIGITS = 6
};
constexpr int LAYOUTS = 7;

// What is read after the rows of a call: asked for from memory while these are multiplied, line by line, so that no
// matrix begins with a wait. null: nothing. Scales that are none a block do not move from row to row.
struct Ahead {
    const uint8_t *data = nullptr, *scales = nullptr;
};

// Up to MAX_VECTORS vectors in one layout, each `stride` elements from the last, padded with zeros.
struct Vectors {
    const void* data;
    int64_t count, columns, stride;
    Ahead ahead{};
};

// Products of the rows first .. last with every vector: out[v * out_stride + row - first].
using RowsFunction = void (*)(const Matrix&, const Vectors&, int64_t first, int64_t last, float* out,
                              int64_t out_stride);

// What one path does with one kind of matrix.
struct Kernel {
    Layout layout;
    RowsFunction rows;
};

// The kernel for a matrix and activations that came as `dtype`. Matrices whose rows are no whole units, or whose blocks
// are smaller than a unit, are served by the portable path.
Kernel choose_kernel(const Matrix& matrix, Dtype dtype);

Kernel portable_kernel(Kind kind);
#if defined(LMX_X86)
Kernel avx512_kernel(const Matrix& matrix, Dtype dtype);
Kernel avx2_kernel(Kind kind);
#elif defined(LMX_NEON)
Kernel neon_kernel(Kind kind);
#endif

// The scale of a block, decoded if it is quantized itself (QLoRA, arXiv 2305.14314, section 3).
inline float block_scale(const Matrix& m, int64_t block) {
    if (!m.nested_map)
        return m.absmax_dtype == BF16 ? bf16_to_float(static_cast<const bf16*>(m.absmax)[block])
                                      : static_cast<const float*>(m.absmax)[block];
    return m.nested_map[static_cast<const uint8_t*>(m.absmax)[block]] * m.nested_absmax[block >> 8] + m.nested_offset;
}

// As quant/int8.py has it.
constexpr float INVERSE_127 = 1.0f / 127.0f;

inline int64_t bytes_of_row(const Matrix& m) {
    switch (m.kind) {
        case FOUR_BIT: return m.columns / 2;
        case INT8: return m.columns;
        case KEPT_F32: return 4 * m.columns;
        default: return 2 * m.columns;
    }
}

// Of a row's scales, where there are several.
inline int64_t bytes_of_scales(const Matrix& m) {
    const int64_t size = m.nested_map ? 1 : m.absmax_dtype == BF16 ? sizeof(bf16) : sizeof(float);
    return m.kind == FOUR_BIT ? m.columns / m.block_size * size : 0;
}

// The rows from `row` on.
inline Ahead ahead_of(const Matrix& m, int64_t row) {
    const int64_t scales = bytes_of_scales(m);
    const auto* absmax = static_cast<const uint8_t*>(m.absmax);
    return {m.data + row * bytes_of_row(m), absmax + row * scales};
}

inline int log2_of(int64_t power) { return __builtin_ctzll(static_cast<unsigned long long>(power)); }

}  // namespace lmx
