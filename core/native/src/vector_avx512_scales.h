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

// The same, where both scales lie in one register: of a run of 16, the first pair's, then the next one's.
LMX_INLINE LMX_AVX512 __m512i first_pair() { return _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0); }
LMX_INLINE LMX_AVX512 __m512i next_pair(__m512i pair) { return _mm512_add_epi32(pair, _mm512_set1_epi32(2)); }
struct OneSum {
    __m512 sums;
    LMX_INLINE LMX_AVX512 void clear() { sums = _mm512_setzero_ps(); }
    LMX_INLINE LMX_AVX512 void add(__m512 part, __m512 pair) { sums = _mm512_fmadd_ps(part, pair, sums); }
    LMX_INLINE LMX_AVX512 __m512 sum() const { return sums; }
};

// For up to 16 units from `at` on, the places of their blocks among those from its own on.
LMX_INLINE LMX_AVX512 __m512i places_of_blocks(int64_t at, int shift) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i units = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(at - (at >> shift << shift))));
    return _mm512_srl_epi32(units, _mm_cvtsi32_si128(shift));
}

LMX_INLINE __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
// How many blocks `count` units from `at` on are in.
LMX_INLINE int64_t blocks_of(int64_t at, int64_t count, int shift) { return ((at + count - 1) >> shift) + 1 - (at >> shift); }

// Scales that are stored as numbers, of one unit after the other, 16 of them made floats at once. WIDE: units share them.
template <int ROWS, class Stored, bool WIDE>
class StoredScales {
public:
    static constexpr int64_t RUN = 16;
    explicit StoredScales(const Matrix& m)
        : absmax_(static_cast<const Stored*>(m.absmax)), shift_(WIDE ? log2_of(m.block_size / UNIT) : 0) {}
    static bool serves(const Matrix&) { return true; }
    LMX_INLINE void begin(int64_t) {}
    LMX_INLINE int64_t run() const { return RUN; }
    // Of all rows side by side.
    LMX_INLINE int64_t bytes_of_run() const { return ROWS * RUN * int64_t{sizeof(Stored)}; }
    // Those of `count` units, RUN at most, from `at` on, and zeros.
    LMX_INLINE LMX_AVX512 __m512 floats(int64_t at, int64_t count) const {
        if constexpr (!WIDE) return load(absmax_ + at, first_lanes(count));
        const __m512 each = load(absmax_ + (at >> shift_), first_lanes(blocks_of(at, count, shift_)));
        return _mm512_maskz_permutexvar_ps(first_lanes(count), places_of_blocks(at, shift_), each);
    }

private:
    LMX_INLINE LMX_AVX512 static __m512 load(const float* at, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, at); }
    LMX_INLINE LMX_AVX512 static __m512 load(const bf16* at, __mmask16 mask) {
        const __m256i narrow = _mm256_maskz_loadu_epi16(mask, at);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
    }
    const Stored* const absmax_;
    const int shift_;
};

// Scales that are quantized themselves: looked up by their codes in tables of all 256, one for each group of 256 blocks
// that a row is in.
template <int ROWS>
class NestedTables {
public:
    explicit NestedTables(const Matrix& m)
        : m_(m), codes_(static_cast<const uint8_t*>(m.absmax)), units_(m.columns / UNIT),
          shift_(log2_of(m.block_size / UNIT)), run_(std::min<int64_t>(units_ & -units_, 16)) {
        std::fill_n(groups_, TABLES, -1);
    }
    static bool serves(const Matrix& m) { return ROWS == 1 || m.columns <= GROUP * UNIT; }
    LMX_INLINE void begin(int64_t apart) { mask_ = (ROWS - 1) * apart < GROUP ? 1 : TABLES - 1; }
    // Units in one group of 256 whole, wherever they begin.
    LMX_INLINE int64_t run() const { return run_; }
    // Of all rows side by side.
    LMX_INLINE int64_t bytes_of_run() const { return ROWS * run_ >> shift_; }
    // The table that the scale of a unit lies in, and the unit's own.
    LMX_INLINE LMX_AVX512 const float* table(int64_t unit) {
        const int64_t group = (unit >> shift_) / GROUP;
        if (groups_[group & mask_] != group) decode(group);
        return tables_[group & mask_];
    }
    LMX_INLINE uint8_t code(int64_t unit) const { return codes_[unit >> shift_]; }
    // Those of `count` units of a run, and zeros.
    LMX_INLINE LMX_AVX512 __m512 floats(int64_t at, int64_t count) {
        const __m128i codes = _mm_maskz_loadu_epi8(first_lanes(blocks_of(at, count, shift_)), codes_ + (at >> shift_));
        const __m512i each = _mm512_permutexvar_epi32(places_of_blocks(at, shift_), _mm512_cvtepu8_epi32(codes));
        return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), first_lanes(count), each, table(at), sizeof(float));
    }

private:
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
    int64_t mask_ = 0;
    const int64_t units_;
    const int shift_;
    const int64_t run_;
    alignas(64) float tables_[TABLES][GROUP];
    int64_t groups_[TABLES];
};

// Vectors that are what they are.
struct NoUnitScales {
    static constexpr int COUNT = 1;
    LMX_INLINE LMX_AVX512 __m512 times(__m512 run, int, int64_t) const { return run; }
};

// Scales of a few rows that are read side by side, two units at a time. A run of units is entered before its pairs are
// asked for in their order.
template <int ROWS, bool NEAR>
class FloatScales {
public:
    using Sums = TwoSums;
    FloatScales(const Matrix& m, const NoUnitScales&)
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
    LMX_INLINE LMX_AVX512 void add(int r, int, __m512 part, Sums& sums) const { sums.add(part, scale(r, 0), scale(r, 1)); }
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

// Scales that are quantized themselves, multiplied as those in float.
template <int ROWS, bool NEAR>
class NestedScales {
public:
    using Sums = TwoSums;
    NestedScales(const Matrix& m, const NoUnitScales&) : tables_(m), units_(m.columns / UNIT) {}
    static bool serves(const Matrix& m) { return NestedTables<ROWS>::serves(m); }
    LMX_INLINE void begin(int64_t step, const uint8_t* soon) {
        apart_ = step * units_, soon_ = soon;
        tables_.begin(apart_);
    }
    LMX_INLINE int64_t run() const { return tables_.run(); }
    LMX_INLINE LMX_AVX512 void enter(int64_t row, int64_t unit) {
        at_ = row * units_ + unit;
        for (int r = 0; r < ROWS; ++r) current_[r] = tables_.table(at_ + r * apart_);
        prefetch<NEAR>(soon_);
        soon_ += tables_.bytes_of_run();
    }
    LMX_INLINE LMX_AVX512 void add(int r, int, __m512 part, Sums& sums) const { sums.add(part, scale(r, 0), scale(r, 1)); }
    LMX_INLINE void next() { at_ += 2; }

private:
    LMX_INLINE float scale(int r, int second) const { return current_[r][tables_.code(at_ + r * apart_ + second)]; }
    NestedTables<ROWS> tables_;
    const uint8_t* soon_ = nullptr;
    int64_t apart_ = 0, at_ = 0;
    const int64_t units_;
    const float* current_[ROWS] = {};
};

// Of a few vectors in digits: a scale for each unit, and zeros behind the last for a run to be read.
template <int VECTORS>
struct UnitScales {
    static constexpr int COUNT = VECTORS;
    float of[VECTORS][MOST_DIGIT_COLUMNS / UNIT + 16];
    LMX_INLINE LMX_AVX512 __m512 times(__m512 run, int v, int64_t unit) const {
        return _mm512_mul_ps(run, _mm512_loadu_ps(of[v] + unit));
    }
};

// A run of scales is made floats at once, times those of the vectors where these have any, and one permutation gives a pair:
// the same arithmetic whatever they are and how many there are. SOURCE is StoredScales or NestedTables.
template <int ROWS, bool NEAR, class Source, class OfX>
class RunScales {
public:
    using Sums = OneSum;
    RunScales(const Matrix& m, const OfX& of_x) : source_(m), of_x_(of_x), units_(m.columns / UNIT) {}
    static bool serves(const Matrix& m) { return Source::serves(m); }
    LMX_INLINE void begin(int64_t step, const uint8_t* soon) {
        apart_ = step * units_, soon_ = soon;
        source_.begin(apart_);
    }
    LMX_INLINE int64_t run() const { return source_.run(); }
    LMX_INLINE LMX_AVX512 void enter(int64_t row, int64_t unit) {
        const int64_t at = row * units_ + unit, count = std::min(units_ - unit, run());
        for (int r = 0; r < ROWS; ++r) {
            const __m512 of_rows = source_.floats(at + r * apart_, count);
            for (int v = 0; v < OfX::COUNT; ++v) run_[r][v] = of_x_.times(of_rows, v, unit);
        }
        pair_ = first_pair();
        for (int64_t i = 0; i < source_.bytes_of_run(); i += 64) prefetch<NEAR>(soon_ + i);
        soon_ += source_.bytes_of_run();
    }
    LMX_INLINE LMX_AVX512 void add(int r, int v, __m512 part, Sums& sums) const {
        sums.add(part, _mm512_permutexvar_ps(pair_, run_[r][v % OfX::COUNT]));
    }
    LMX_INLINE LMX_AVX512 void next() { pair_ = next_pair(pair_); }

private:
    Source source_;
    const OfX& of_x_;
    const uint8_t* soon_ = nullptr;
    int64_t apart_ = 0;
    const int64_t units_;
    __m512 run_[ROWS][OfX::COUNT];
    __m512i pair_;
};

}  // namespace lmx

#endif
