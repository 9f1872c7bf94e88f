// The scales of four-bit blocks, as the AVX-512 kernel for a few vectors multiplies by them.
#pragma once

#include "vector_avx512.h"

#if defined(LMX_X86)

namespace lmx {

// Sums of units times their scales, where these stay in memory until they are multiplied: an operand that is broadcast on
// its way takes no time of the execution units that permute, which have most to do here. The lower half of the lanes belongs
// to the first of two units, the upper to the second: all are multiplied by both, and in the end half of each is taken.
struct TwoSums {
    __m512 firsts, seconds;
    LMX_INLINE LMX_AVX512 void clear() { firsts = seconds = _mm512_setzero_ps(); }
    LMX_INLINE LMX_AVX512 void add(__m512 part, float first, float second) {
        firsts = _mm512_fmadd_ps(part, _mm512_set1_ps(first), firsts);
        seconds = _mm512_fmadd_ps(part, _mm512_set1_ps(second), seconds);
    }
    LMX_INLINE LMX_AVX512 __m512 sum() const { return _mm512_mask_blend_ps(0xff00, firsts, seconds); }
};

// The same, where both scales lie in one register.
struct OneSum {
    __m512 sums;
    LMX_INLINE LMX_AVX512 void clear() { sums = _mm512_setzero_ps(); }
    LMX_INLINE LMX_AVX512 void add(__m512 part, __m512 pair) { sums = _mm512_fmadd_ps(part, pair, sums); }
    LMX_INLINE LMX_AVX512 __m512 sum() const { return sums; }
};

// Scales of a few rows that are read side by side, two units at a time. A run of units is entered before its pairs are
// asked for in their order.
template <int ROWS, bool NEAR>
class FloatScales {
public:
    using Sums = TwoSums;
    static constexpr bool OF_X = false;
    FloatScales(const Matrix& m, const float*)
        : absmax_(static_cast<const float*>(m.absmax)), units_(m.columns / UNIT), shift_(log2_of(m.block_size / UNIT)) {}
    static bool serves(const Matrix&) { return true; }
    // Rows `step` apart are read now, and what to ask for meanwhile.
    LMX_INLINE void begin(int64_t step, const uint8_t* soon) { apart_ = step * units_, soon_ = soon; }
    LMX_INLINE int64_t run() const { return 16; }
    LMX_INLINE LMX_AVX512 void enter(int64_t row, int64_t unit) {
        at_ = row * units_ + unit;
        if (shift_) return;
        for (int r = 0; r < ROWS; ++r, soon_ += 16 * sizeof(float)) prefetch<NEAR>(soon_);
    }
    LMX_INLINE LMX_AVX512 void add(int r, __m512 part, Sums& sums) const { sums.add(part, scale(r, 0), scale(r, 1)); }
    LMX_INLINE void next() { at_ += 2; }

private:
    LMX_INLINE float scale(int r, int second) const { return absmax_[(at_ + r * apart_ + second) >> shift_]; }
    const float* const absmax_;
    const uint8_t* soon_ = nullptr;
    int64_t apart_ = 0;
    const int64_t units_;
    const int shift_;
    int64_t at_ = 0;
};

// The same in bf16: a run of them is made floats at once, and one permutation gives a pair. WIDE: units share them.
// TIMES_X: and multiplied by the scales of x then, one a unit.
template <int ROWS, bool NEAR, bool WIDE, bool TIMES_X>
class NarrowScales {
public:
    using Sums = OneSum;
    static constexpr bool OF_X = TIMES_X;
    NarrowScales(const Matrix& m, const float* of_x)
        : absmax_(static_cast<const bf16*>(m.absmax)), of_x_(of_x), units_(m.columns / UNIT),
          shift_(WIDE ? log2_of(m.block_size / UNIT) : 0) {}
    static bool serves(const Matrix&) { return true; }
    LMX_INLINE void begin(int64_t step, const uint8_t* soon) { apart_ = step * units_, soon_ = soon; }
    LMX_INLINE int64_t run() const { return RUN; }
    LMX_INLINE LMX_AVX512 void enter(int64_t row, int64_t unit) {
        const int64_t at = row * units_ + unit, count = std::min<int64_t>(units_ - unit, RUN);
        for (int r = 0; r < ROWS; ++r) {
            run_[r] = floats(at + r * apart_, count);
            if constexpr (TIMES_X) run_[r] = _mm512_mul_ps(run_[r], _mm512_loadu_ps(of_x_ + unit));
        }
        pair_ = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
        for (int i = 0; i < ROWS * RUN * int{sizeof(bf16)}; i += 64) prefetch<NEAR>(soon_ + i);
        soon_ += ROWS * RUN * sizeof(bf16);
    }
    LMX_INLINE LMX_AVX512 void add(int r, __m512 part, Sums& sums) const {
        sums.add(part, _mm512_permutexvar_ps(pair_, run_[r]));
    }
    LMX_INLINE LMX_AVX512 void next() { pair_ = _mm512_add_epi32(pair_, _mm512_set1_epi32(2)); }

private:
    static constexpr int RUN = 16;
    LMX_INLINE LMX_AVX512 __m512 floats(int64_t at, int64_t count) const {
        const int64_t first = WIDE ? at >> shift_ : at, blocks = WIDE ? ((at + count - 1) >> shift_) + 1 - first : count;
        const __m256i narrow = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << blocks) - 1), absmax_ + first);
        const __m512 each = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
        if constexpr (!WIDE) return each;
        const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i units = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(at - (first << shift_))));
        return _mm512_permutexvar_ps(_mm512_srl_epi32(units, _mm_cvtsi32_si128(shift_)), each);
    }
    const bf16* const absmax_;
    const float* const of_x_;
    const uint8_t* soon_ = nullptr;
    int64_t apart_ = 0;
    const int64_t units_;
    const int shift_;
    __m512 run_[ROWS];
    __m512i pair_;
};

// Scales that are quantized themselves: looked up by their codes in tables of all 256, one for each group of 256 blocks
// that a row is in, and multiplied as those in float.
template <int ROWS, bool NEAR>
class NestedScales {
public:
    using Sums = TwoSums;
    static constexpr bool OF_X = false;
    NestedScales(const Matrix& m, const float*)
        : m_(m), codes_(static_cast<const uint8_t*>(m.absmax)), units_(m.columns / UNIT),
          shift_(log2_of(m.block_size / UNIT)), run_(std::min<int64_t>(units_ & -units_, 16)) {
        std::fill_n(groups_, TABLES, -1);
    }
    static bool serves(const Matrix& m) { return ROWS == 1 || m.columns <= GROUP * UNIT; }
    LMX_INLINE void begin(int64_t step, const uint8_t* soon) {
        apart_ = step * units_, soon_ = soon;
        mask_ = (ROWS - 1) * apart_ < GROUP ? 1 : TABLES - 1;
    }
    // Lies in one group of 256 whole, wherever it begins.
    LMX_INLINE int64_t run() const { return run_; }
    LMX_INLINE LMX_AVX512 void enter(int64_t row, int64_t unit) {
        at_ = row * units_ + unit;
        for (int r = 0; r < ROWS; ++r) {
            const int64_t group = ((at_ + r * apart_) >> shift_) / GROUP;
            current_[r] = tables_[group & mask_];
            if (groups_[group & mask_] != group) decode(group);
        }
        prefetch<NEAR>(soon_);
        soon_ += ROWS * run_ >> shift_;
    }
    LMX_INLINE LMX_AVX512 void add(int r, __m512 part, Sums& sums) const { sums.add(part, scale(r, 0), scale(r, 1)); }
    LMX_INLINE void next() { at_ += 2; }

private:
    LMX_INLINE float scale(int r, int second) const {
        return current_[r][codes_[(at_ + r * apart_ + second) >> shift_]];
    }
    LMX_INLINE LMX_AVX512 void decode(int64_t group) {
        groups_[group & mask_] = group;
        float* table = tables_[group & mask_];
        prefetch<true>(reinterpret_cast<const uint8_t*>(m_.nested_absmax + group + GROUPS_AHEAD));
        const __m512 absmax = _mm512_set1_ps(m_.nested_absmax[group]), offset = _mm512_set1_ps(m_.nested_offset);
        for (int64_t i = 0; i < GROUP; i += 16)
            _mm512_store_ps(table + i, _mm512_fmadd_ps(_mm512_loadu_ps(m_.nested_map + i), absmax, offset));
    }
    // Rows side by side that are no farther apart than a group is long are in groups that follow each other, two or four at
    // most. No more tables than needed: each is written anew for its next group, and must still be in the first cache then.
    static constexpr int64_t GROUP = 256, TABLES = 4, GROUPS_AHEAD = 4;
    const Matrix& m_;
    const uint8_t* const codes_;
    const uint8_t* soon_ = nullptr;
    int64_t apart_ = 0, mask_ = 0;
    const int64_t units_;
    const int shift_;
    const int64_t run_;
    int64_t at_ = 0;
    alignas(64) float tables_[TABLES][GROUP];
    const float* current_[ROWS] = {};
    int64_t groups_[TABLES];
};

}  // namespace lmx

#endif
