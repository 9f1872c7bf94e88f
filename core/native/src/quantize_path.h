// Weights to codes, the same bits as the torch of quant/four_bit.py and quant/int8.py: every product, quotient and
// comparison is the one that stands there, in float. NaN and infinity reach absmax, by which Python refuses them.

namespace lmx {
namespace {

using Ints = int32_t __attribute__((vector_size(4 * LMX_LANES)));

// A half as the 16 bits it is: bf16 has the name of that type already.
struct half {
    uint16_t bits;
};

LMX_FORCE Floats load(const half* at) {
#if LMX_LANES == 16
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
#elif LMX_LANES == 8
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
#else
    Halves halves;
    std::memcpy(&halves, at, sizeof halves);
    const Words bits = __builtin_convertvector(halves, Words), magnitude = (bits & 0x7fff) << 13;
    // The exponent counts from 15 there and from 127 here; the product puts that right for small numbers too.
    const Words finite = words_of(floats_of(magnitude) * 0x1p112f);
    const Words value = (bits & 0x7c00) == 0x7c00 ? (magnitude | 0x7f800000u) : finite;
    return floats_of(value | (bits & 0x8000) << 16);
#endif
}

// Neighbours, which will share a byte: the first and the second of each pair.
struct Pairs {
    Floats first, second;
};

LMX_FORCE Pairs load_pairs(const bf16* at) {
    Words words;
    std::memcpy(&words, at, sizeof words);
    return {floats_of(words << 16), floats_of(words & 0xffff0000u)};
}

template <typename Stored>
LMX_FORCE Pairs load_pairs(const Stored* at) {
    const Floats low = load(at), high = load(at + LANES);
#if LMX_LANES == 16
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
    return {_mm512_permutex2var_ps(low, even, high), _mm512_permutex2var_ps(low, odd, high)};
#else
    Pairs out;
    for (int64_t i = 0; i < LANES; ++i) {
        out.first[i] = i < LANES / 2 ? low[2 * i] : high[2 * i - LANES];
        out.second[i] = i < LANES / 2 ? low[2 * i + 1] : high[2 * i + 1 - LANES];
    }
    return out;
#endif
}

LMX_FORCE Ints magnitudes_of(Floats x) { return reinterpret_cast<Ints>(words_of(x) & 0x7fffffffu); }

// By their bits, magnitudes are in the order of their values, with infinity and then NaN above all numbers.
LMX_FORCE Ints larger_of(Ints x, Ints y) {
#if LMX_LANES == 16
    return reinterpret_cast<Ints>(_mm512_max_epi32(reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(y)));
#elif LMX_LANES == 8
    return reinterpret_cast<Ints>(_mm256_max_epi32(reinterpret_cast<__m256i>(x), reinterpret_cast<__m256i>(y)));
#else
    return x > y ? x : y;
#endif
}

LMX_FORCE float largest_of(Ints bits) {
#if LMX_LANES == 16
    const int32_t largest = _mm512_reduce_max_epi32(reinterpret_cast<__m512i>(bits));
#else
    int32_t largest = 0;
    for (int64_t i = 0; i < LANES; ++i) largest = std::max(largest, static_cast<int32_t>(bits[i]));
#endif
    float out;
    std::memcpy(&out, &largest, 4);
    return out;
}

// The lowest byte of each word.
LMX_FORCE void store_bytes(Words x, uint8_t* at) {
#if LMX_LANES == 16
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(x)));
#else
    using Bytes = uint8_t __attribute__((vector_size(LMX_LANES)));
    const Bytes bytes = __builtin_convertvector(x, Bytes);
    std::memcpy(at, &bytes, sizeof bytes);
#endif
}

// How many of the 15 sorted thresholds lie below a value: a binary search, or all of them where that is not quicker.
struct SearchedRanks {
    const float* thresholds;

    LMX_FORCE Words operator()(Floats x) const {
#if LMX_LANES == 16
        const __m512 table = _mm512_maskz_loadu_ps(0x7fff, thresholds);
        __m512i rank = _mm512_setzero_si512();
        for (int step = 8; step; step /= 2) {
            const __m512 middle = _mm512_permutexvar_ps(_mm512_add_epi32(rank, _mm512_set1_epi32(step - 1)), table);
            const __mmask16 above = _mm512_cmp_ps_mask(x, middle, _CMP_GT_OQ);
            rank = _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(step));
        }
        return reinterpret_cast<Words>(rank);
#else
        Words rank{};
        for (int i = 0; i < RANKS - 1; ++i) rank -= reinterpret_cast<Words>(x > spread(thresholds[i]));
        return rank;
#endif
    }
};

#if LMX_LANES == 16

// The same by one comparison, for values in [-1, 1] cut into 31 even cells, of which none holds two thresholds: NF4's.
// In all that counts a value's cell rises with it, and a threshold's is found as the values' are; so a value in
// another cell than a threshold lies on the side of it that the cell says, also where it is rounded into that cell.
class CellRanks {
   public:
    LMX_FORCE explicit CellRanks(const float* thresholds) {
        alignas(64) float threshold[CELLS];
        alignas(64) int32_t below[CELLS] = {}, cells[LANES];
        _mm512_store_si512(cells, cell_of(_mm512_maskz_loadu_ps(0x7fff, thresholds)));
        for (float& each : threshold) each = HUGE_VALF;
        apart = true;
        for (int i = 0; i < RANKS - 1; ++i) {
            const int cell = cells[i] & (CELLS - 1);
            apart &= threshold[cell] == HUGE_VALF;
            threshold[cell] = thresholds[i];
            for (int above = cell + 1; above < CELLS; ++above) ++below[above];
        }
        for (int i = 0; i < 2; ++i) {
            threshold_[i] = _mm512_load_ps(threshold + LANES * i);
            below_[i] = _mm512_load_si512(below + LANES * i);
        }
    }

    LMX_FORCE Words operator()(Floats x) const {
        const __m512i cell = cell_of(x), below = _mm512_permutex2var_epi32(below_[0], cell, below_[1]);
        const __mmask16 above =
            _mm512_cmp_ps_mask(x, _mm512_permutex2var_ps(threshold_[0], cell, threshold_[1]), _CMP_GT_OQ);
        return reinterpret_cast<Words>(_mm512_mask_add_epi32(below, above, below, _mm512_set1_epi32(1)));
    }

    bool apart;  // whether the thresholds are such that this is true

   private:
    static constexpr int CELLS = 32;

    // In the lowest five bits, as the permutations read it: 1 to 31, and 16 for zero.
    LMX_FORCE static __m512i cell_of(__m512 x) {
        return _mm512_castps_si512(_mm512_fmadd_ps(x, _mm512_set1_ps(15.49f), _mm512_set1_ps(12582912.0f + 16)));
    }

    __m512 threshold_[2];
    __m512i below_[2];
};

#endif

template <typename Stored, typename Ranks>
LMX_TARGET void four_bit_blocks(const FourBit& q, const Ranks& ranks, int64_t first, int64_t last) {
    const int64_t size = q.block_size;  // once: for all the compiler knows, bytes that are stored may change it
    const uint8_t* codes = q.codes;
    for (int64_t block = first; block < last; ++block) {
        const Stored* x = static_cast<const Stored*>(q.x) + block * size;
        uint8_t* packed = q.packed + block * size / 2;
        Ints largest{};
        for (int64_t i = 0; i < size; i += 2 * LANES) {
            const Pairs pairs = load_pairs(x + i);
            largest = larger_of(largest, larger_of(magnitudes_of(pairs.first), magnitudes_of(pairs.second)));
        }
        const float absmax = largest_of(largest), inverse = 1.0f / std::max(absmax, SMALLEST_ABSMAX);
        for (int64_t i = 0; i < size; i += 2 * LANES) {
            const Pairs pairs = load_pairs(x + i);
            store_bytes(ranks(pairs.first * inverse) << 4 | ranks(pairs.second * inverse), packed + i / 2);
        }
        q.absmax[block] = absmax;
        if (codes)
            for (int64_t i = 0; i < size / 2; ++i) packed[i] = codes[packed[i]];
    }
}

template <typename Stored>
LMX_TARGET void four_bit_of(const FourBit& q, int64_t first, int64_t last) {
#if LMX_LANES == 16
    const CellRanks cells(q.thresholds);
    if (cells.apart) return four_bit_blocks<Stored>(q, cells, first, last);
#endif
    four_bit_blocks<Stored>(q, SearchedRanks{q.thresholds}, first, last);
}

// The nearest float16 as a float, but x itself where that would be infinite.
LMX_FORCE Floats half_precision(Floats x) {
    const Words bits = words_of(x);
    const Floats magnitude = floats_of(bits & 0x7fffffffu);
    const Floats normal = floats_of((bits + 0xfff + ((bits >> 13) & 1)) & ~0x1fffu);
    const Floats steps = (magnitude + 0.5f) - 0.5f;  // below 2^-14 halves are 2^-24 apart, as floats above 0.5 are
    const Floats small = floats_of(words_of(steps) | (bits & 0x80000000u));
    const Floats finite = magnitude < 0x1p-14f ? small : normal;
    return magnitude < 65520.0f ? finite : x;
}

LMX_FORCE Floats load_half_precision(const half* at) { return load(at); }

template <typename Stored>
LMX_FORCE Floats load_half_precision(const Stored* at) {
    return half_precision(load(at));
}

// Eight bits of the nearest whole number, halves to the even one: what stands lowest in the float 1.5 * 2^23 above it.
LMX_FORCE Words nearest_of(Floats x) { return words_of(x + 12582912.0f); }

template <typename Stored>
LMX_TARGET void int8_of(const Int8& q, int64_t first, int64_t last) {
    const int64_t whole = q.columns / LANES * LANES, rest = q.columns - whole;
    for (int64_t row = first; row < last; ++row) {
        const Stored* x = static_cast<const Stored*>(q.x) + row * q.columns;
        uint8_t* out = q.weight + row * q.columns;
        Stored tail[LANES] = {};
        if (rest) std::memcpy(tail, x + whole, static_cast<size_t>(rest) * sizeof(Stored));
        Ints largest = magnitudes_of(load_half_precision(tail));
        for (int64_t i = 0; i < whole; i += LANES)
            largest = larger_of(largest, magnitudes_of(load_half_precision(x + i)));
        const float absmax = largest_of(largest), scale = absmax > 0 ? 1.0f / absmax * 127.0f : 0.0f;
        for (int64_t i = 0; i < whole; i += LANES) store_bytes(nearest_of(load_half_precision(x + i) * scale), out + i);
        uint8_t bytes[LANES];
        store_bytes(nearest_of(load_half_precision(tail) * scale), bytes);
        std::memcpy(out + whole, bytes, static_cast<size_t>(rest));
        q.absmax[row] = absmax;
    }
}

template <typename Stored>
LMX_FORCE Floats square_of(const float* values, const Stored* x, int64_t count) {
    const Floats away = load_some(values, count) - load_some(x, count);
    return away * away;
}

// The sum of (values - x)^2.
template <typename Stored>
LMX_TARGET double squares_of(const float* values, const Stored* x, int64_t count) {
    Floats even{}, odd{};  // two, so that no addition waits for the one before
    int64_t i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        even += square_of(values + i, x + i, LANES);
        odd += square_of(values + i + LANES, x + i + LANES, LANES);
    }
    for (; i < count; i += LANES) even += square_of(values + i, x + i, count - i);
    return sum_of(even + odd);
}

LMX_TARGET void four_bit(const FourBit& q, Dtype dtype, int64_t first, int64_t last) {
    if (dtype == F32) return four_bit_of<float>(q, first, last);
    if (dtype == F16) return four_bit_of<half>(q, first, last);
    four_bit_of<bf16>(q, first, last);
}

LMX_TARGET void int8(const Int8& q, Dtype dtype, int64_t first, int64_t last) {
    if (dtype == F32) return int8_of<float>(q, first, last);
    if (dtype == F16) return int8_of<half>(q, first, last);
    int8_of<bf16>(q, first, last);
}

LMX_TARGET double squares(const float* values, const void* x, Dtype dtype, int64_t count) {
    if (dtype == F32) return squares_of(values, static_cast<const float*>(x), count);
    if (dtype == F16) return squares_of(values, static_cast<const half*>(x), count);
    return squares_of(values, static_cast<const bf16*>(x), count);
}

}  // namespace
}  // namespace lmx
