// What all kernels share: exported names, the choice of an instruction set, threads, 16-bit floats.
//
// No torch headers and no C++ runtime beyond the compiler's own: Python calls these functions through ctypes with the
// addresses of tensors that it has checked (core/native/*.py). A kernel trusts its arguments.
#pragma once

#include <cstdint>
#include <cstring>

#define LMX_EXPORT extern "C" __attribute__((visibility("default")))

#if defined(__x86_64__)
#include <immintrin.h>
#define LMX_X86 1
#define LMX_AVX2 __attribute__((target("avx2,fma,f16c")))
#define LMX_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,avx512vnni,fma,f16c")))
#if defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define LMX_AMX __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,fma")))
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#define LMX_NEON 1
#endif

namespace lmx {

// Kernel paths by rising demands on the CPU; NEON stands alone on its architecture. AMX has all that AVX512 has, and
// takes it for what tiles are no use for.
enum Level : int { PORTABLE = 0, AVX2 = 1, AVX512 = 2, NEON = 3, AMX = 4 };

// The path in use: the best that this CPU has, unless lmx_set_level chose another.
Level level();
inline bool has_avx512() { return level() == AVX512 || level() == AMX; }
// Whether memory is read fastest from several pages of 4 KB side by side: CPUs with AMX, Intel's, look ahead in each by itself
// (benchmarks/large_pages.py). Elsewhere one after the other was faster, or this was not measured.
inline bool in_pages() { return level() == AMX; }
// Whether the first cache for data holds 48 KB, as Zen 5's and those of CPUs with AMX do, and not 32 KB.
bool has_large_first_cache();

// Dtypes of activations, as Python passes them.
enum Dtype : int { F32 = 0, BF16 = 1, F16 = 2 };

using bf16 = uint16_t;

inline float bf16_to_float(bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

// Round to nearest even, NaN stays NaN: as torch rounds.
inline bf16 float_to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<bf16>((bits >> 16) | 0x40);
    return static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Calls body(first, last) for parts of [0, count) on torch's own OpenMP pool. `grain`: no part is cut finer, and part
// borders are multiples of it, so that what a part computes never depends on the number of threads.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, const Body& body);

// Calls body(i) for every i below count, each on whichever thread is free.
template <typename Body>
void parallel_each(int64_t count, const Body& body);

}  // namespace lmx

#include "threads.h"
