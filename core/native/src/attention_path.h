// The body of every attention path, in the compilers' generic vectors. Included by one file a path, which says how wide
// its registers are (LANES), how many there are (REGISTERS), for which CPU to compile (LMX_TARGET), and what multiplies and
// adds at once there, if anything does (LMX_FUSED). Functions that meet vectors must be compiled for that CPU themselves:
// a template shared by the paths would be lowered to the oldest one before it is inlined.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "exponential.h"
#include "shape_path.h"

namespace lmx {
namespace {

using Integers = int32_t __attribute__((vector_size(4 * LANES)));

LMX_FORCE void load_pair(const float* at, Floats& first, Floats& second) {
    load(at, first);
    load(at + LANES, second);
}

LMX_FORCE void load_pair(const bf16* at, Floats& even, Floats& odd) {
    Words words;
    std::memcpy(&words, at, sizeof words);
    const Words low = words << 16, high = words & 0xffff0000u;
    std::memcpy(&even, &low, sizeof even);
    std::memcpy(&odd, &high, sizeof odd);
}

// The last elements of a row, zeros behind them.
template <typename Stored>
LMX_FORCE void load_last(const Stored* at, int64_t count, Floats& first, Floats& second) {
    Stored last[PAIR] = {};
    std::memcpy(last, at, static_cast<size_t>(count) * sizeof(Stored));
    load_pair(last, first, second);
}

// a * b + c, rounded once where the CPU can: where one head of keys serves many of queries, they are out of the cache, and
// this is what takes the time.
LMX_FORCE Floats fused(Floats a, Floats b, Floats c) {
#if defined(LMX_FUSED)
    return LMX_FUSED(a, b, c);
#else
    return a * b + c;
#endif
}

LMX_FORCE Floats spread(float x) { return x - Floats{}; }

// Keys or values [count] of one head, `stride` apart, and what is asked for while they are read: hardware that looks ahead by
// itself gets less out of memory. NEAR: rows a few KB behind, into the first cache. Else, where rows in several pages are read
// side by side (Order, vector_avx512.h), as many rows of what comes next, into the second.
template <typename Stored, bool NEAR>
class Rows {
public:
    // next: rows that are read after these, `stride` apart too, or these again. Where there are fewer of them than of these, or
    // four at once end behind the last of these, a few that are asked for are nobody's.
    Rows(const Stored* rows, const Stored* next, int64_t count, int64_t stride)
        : rows_(rows), next_(next), count_(count), stride_(stride),
          ahead_(std::min(count, std::max<int64_t>(1, near_ahead() / (stride * static_cast<int64_t>(sizeof(Stored)))))) {}

    LMX_FORCE const Stored* at(int64_t row) const { return rows_ + row * stride_; }
    LMX_FORCE const Stored* later(int64_t row) const {
        if (!NEAR) return next_ + row * stride_;
        return row + ahead_ < count_ ? at(row + ahead_) : next_ + (row + ahead_ - count_) * stride_;
    }
    // Asks for a pair of such a row.
    LMX_FORCE static void ask_for(const Stored* pair) {
        constexpr int64_t LINE = 64 / sizeof(Stored);
        for (int64_t d = 0; d < PAIR; d += LINE) __builtin_prefetch(pair + d, 0, NEAR ? 3 : 2);
    }

    // Calls several(number, row, step) for the rows row, row + step ... of `number`, a constant: four, and one where fewer are
    // left. They lie in pages of their own, or one after the other.
    template <typename Several>
    LMX_FORCE void for_each(const Several& several) const {
        constexpr std::integral_constant<int, 4> four;
        constexpr std::integral_constant<int, 1> one;
        constexpr int64_t PAGE = 4096 / sizeof(Stored);
        const int64_t step = NEAR ? 1 : (PAGE + stride_ - 1) / stride_;
        int64_t row = 0;
        for (; row + four * step <= count_; row += four * step)
            for (int64_t i = 0; i < step; ++i) several(four, row + i, step);
        if constexpr (!NEAR)
            for (; row + four <= count_; row += four) several(four, row, 1);
        for (; row < count_; ++row) several(one, row, 1);
    }

private:
    static int64_t near_ahead() { return has_large_first_cache() ? 8192 : 5120; }
    const Stored *const rows_, *const next_;
    const int64_t count_, stride_, ahead_;
};

// scores[g][r * step] = queries[g] . keys[r * apart]; soon: as many rows to ask for.
template <typename Stored, bool NEAR, int COUNT, int ROWS>
LMX_FORCE void score_rows(const float* queries, const Stored* keys, const Stored* soon, int64_t apart, int64_t width,
                          int64_t step, float* scores) {
    const int64_t row = padded_width(width), whole = width / PAIR * PAIR;
    Floats sums[ROWS][COUNT][2], first, second, query[2];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int g = 0; g < COUNT; ++g) sums[r][g][0] = sums[r][g][1] = Floats{};
    const auto add = [&](int r, int64_t d) LMX_TARGET __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int g = 0; g < COUNT; ++g) {
            load_pair(queries + g * row + d, query[0], query[1]);
            sums[r][g][0] = fused(first, query[0], sums[r][g][0]);
            sums[r][g][1] = fused(second, query[1], sums[r][g][1]);
        }
    };
    for (int64_t d = 0; d < whole; d += PAIR)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            Rows<Stored, NEAR>::ask_for(soon + r * apart + d);
            load_pair(keys + r * apart + d, first, second);
            add(r, d);
        }
    if (whole < width)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            load_last(keys + r * apart + whole, width - whole, first, second);
            add(r, whole);
        }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int g = 0; g < COUNT; ++g) scores[g * CHUNK + r * step] = sum_of<LANES>(sums[r][g][0] + sums[r][g][1]);
}

// scores[g][j] = queries[g] . keys[j].
template <int COUNT, typename Stored, bool NEAR>
LMX_TARGET void score(const float* queries, const Rows<Stored, NEAR>& keys, int64_t stride, int64_t width,
                      float (*scores)[CHUNK]) {
    keys.for_each([&](auto several, int64_t row, int64_t step) LMX_TARGET __attribute__((always_inline)) {
        // A single sum would wait for itself; several queries have several.
        constexpr int ROWS = COUNT == 1 ? decltype(several)::value : 1;
        for (int64_t at = row; at < row + several * step; at += ROWS * step)
            score_rows<Stored, NEAR, COUNT, ROWS>(queries, keys.at(at), keys.later(at), step * stride, width, step,
                                                  scores[0] + at);
    });
}

// e^x as `exponential` of exponential.h computes it: compilers keep the branches of a loop over that one.
LMX_FORCE void exponentials(Floats& x) {
    const Floats low = x < -87.3f ? Floats{} - 87.3f : x;  // NaN stays; weights are never above 1
    const Floats shifted = low * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to a whole number
    const Floats n = shifted - 12582912.0f;
    const Floats r = (low - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
    Floats p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    Integers bits, power;
    std::memcpy(&bits, &p, sizeof bits);
    std::memcpy(&power, &shifted, sizeof power);
    bits += power << 23;  // the lowest bits of `shifted` are n
    std::memcpy(&x, &bits, sizeof x);
}

// Scores become weights e^(scale * score - max); returns max and the sum of the weights.
LMX_TARGET inline void weigh(float* scores, int64_t count, float scale, float* max, float* sum) {
    for (int64_t j = count; j < CHUNK; ++j) scores[j] = -INFINITY;
    Floats part, most, sums = {};
    load(scores, most);
    for (int64_t j = LANES; j < CHUNK; j += LANES) {
        load(scores + j, part);
        most = part > most ? part : most;
    }
    float largest = most[0];
    for (int i = 1; i < LANES; ++i) largest = most[i] > largest ? most[i] : largest;
    largest *= scale;
    for (int64_t j = 0; j < CHUNK; j += LANES) {
        load(scores + j, part);
        part = part * scale - largest;
        exponentials(part);
        std::memcpy(scores + j, &part, sizeof part);
    }
    for (int64_t j = count; j < CHUNK; ++j) scores[j] = 0;
    for (int64_t j = 0; j < CHUNK; j += LANES) {
        load(scores + j, part);
        sums += part;
    }
    *max = largest;
    *sum = sum_of<LANES>(sums);
}

// out[g][d .. d + PAIRS * PAIR) = sum_j weights[g][j] * values[j] in the same columns of every value; `last`: so many of
// them are there where it is less than one pair.
template <int COUNT, int PAIRS, typename Stored, bool NEAR>
LMX_TARGET void blend(const float (*weights)[CHUNK], const Rows<Stored, NEAR>& values, int64_t d, int64_t last, float* out,
                      int64_t out_stride) {
    Floats sums[COUNT][PAIRS][2], first, second;
    for (int g = 0; g < COUNT; ++g)
        for (int i = 0; i < PAIRS; ++i) sums[g][i][0] = sums[g][i][1] = Floats{};
    values.for_each([&](auto several, int64_t row, int64_t step) LMX_TARGET __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int64_t at = row; at < row + several * step; at += step) {
            const Stored *value = values.at(at) + d, *soon = values.later(at) + d;
#pragma GCC unroll 4
            for (int i = 0; i < PAIRS; ++i) {
                values.ask_for(soon + i * PAIR);
                if (last < PAIR) load_last(value + i * PAIR, last, first, second);
                else load_pair(value + i * PAIR, first, second);
#pragma GCC unroll 4
                for (int g = 0; g < COUNT; ++g) {
                    sums[g][i][0] = fused(first, spread(weights[g][at]), sums[g][i][0]);
                    sums[g][i][1] = fused(second, spread(weights[g][at]), sums[g][i][1]);
                }
            }
        }
    });
    for (int g = 0; g < COUNT; ++g)
        for (int i = 0; i < PAIRS; ++i)
            for (int half = 0; half < 2; ++half)
                std::memcpy(out + g * out_stride + d + i * PAIR + half * LANES, &sums[g][i][half], sizeof(Floats));
}

template <int COUNT, typename Stored, bool NEAR>
LMX_TARGET void blend_all(const float (*weights)[CHUNK], const Rows<Stored, NEAR>& values, int64_t width, float* out,
                          int64_t out_stride) {
    constexpr int PAIRS = COUNT == 1 ? 4 : REGISTERS / 4 / COUNT;
    int64_t d = 0;
    for (; d + PAIRS * PAIR <= width; d += PAIRS * PAIR) blend<COUNT, PAIRS>(weights, values, d, PAIR, out, out_stride);
    for (; d < width; d += PAIR) blend<COUNT, 1>(weights, values, d, width - d, out, out_stride);
}

template <int COUNT, typename Stored, bool NEAR>
LMX_TARGET void chunk_of(const float* queries, const Stored* keys, const Stored* values, const Stored* next, int64_t count,
                         int64_t stride, int64_t width, float* out, int64_t out_stride) {
    alignas(64) float scores[COUNT][CHUNK];
    score<COUNT>(queries, Rows<Stored, NEAR>(keys, values, count, stride), stride, width, scores);
    const float scale = 1.0f / std::sqrt(static_cast<float>(width));
    for (int g = 0; g < COUNT; ++g)
        weigh(scores[g], count, scale, out + g * out_stride, out + g * out_stride + 1);
    blend_all<COUNT>(scores, Rows<Stored, NEAR>(values, next, count, stride), width, out + PARTIAL_HEAD, out_stride);
}

template <typename Stored, bool NEAR>
LMX_TARGET void chunk(const float* queries, int64_t group, const void* keys, const void* values, const void* next,
                      int64_t count, int64_t stride, int64_t width, float* out, int64_t out_stride) {
    const auto *k = static_cast<const Stored*>(keys), *v = static_cast<const Stored*>(values);
    const auto* after = static_cast<const Stored*>(next);
    static constexpr decltype(&chunk_of<1, Stored, NEAR>) by_count[] = {
        chunk_of<1, Stored, NEAR>, chunk_of<2, Stored, NEAR>, chunk_of<3, Stored, NEAR>, chunk_of<4, Stored, NEAR>};
    static_assert(GROUP == 4, "one for each number of heads");
    for (int64_t g = 0; g < group; g += GROUP) {
        const int64_t several = std::min(group - g, GROUP);
        by_count[several - 1](queries + g * padded_width(width), k, v, g + several < group ? k : after, count, stride, width,
                              out + g * out_stride, out_stride);
    }
}

template <typename Stored>
LMX_TARGET void combine(const float* __restrict partials, int64_t chunks, int64_t width, float* __restrict sums,
                        float* __restrict answer) {
    const int64_t row = padded_width(width), stride = PARTIAL_HEAD + row;
    float largest = -INFINITY, sum = 0;
    for (int64_t c = 0; c < chunks; ++c) largest = partials[c * stride] > largest ? partials[c * stride] : largest;
    for (int64_t d = 0; d < row; ++d) sums[d] = 0;
    for (int64_t c = 0; c < chunks; ++c) {
        const float* partial = partials + c * stride;
        const float weight = exponential(partial[0] - largest);
        sum += weight * partial[1];
        for (int64_t d = 0; d < row; ++d) sums[d] += weight * partial[PARTIAL_HEAD + d];
    }
    const float scale = 1.0f / sum;
    for (int64_t d = 0; d < row; ++d) sums[d] *= scale;
    const int64_t whole = width / PAIR * PAIR;
    for (int64_t d = 0; d < whole; d += PAIR) take_pair(sums + d, answer + d, Stored{});
    for (int64_t d = whole; d < width; ++d) answer[d] = sums[whole + place(d - whole, Stored{})];
}

template <typename Stored>
AttentionPath path_of() {
    return {factor<Stored>, shape<Stored>, lay_out<Stored>, in_pages() ? chunk<Stored, false> : chunk<Stored, true>,
            combine<Stored>};
}

AttentionPath path_of(Dtype dtype) { return dtype == BF16 ? path_of<bf16>() : path_of<float>(); }

}  // namespace
}  // namespace lmx
