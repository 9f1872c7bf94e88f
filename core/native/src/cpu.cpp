// Which instructions this CPU has, and which path the kernels take.
#include "lmx_native.h"

#if defined(__unix__)
#include <unistd.h>
#endif
#if defined(LMX_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#endif

namespace lmx {

// Whether there are tiles of bf16, and the system lets this process have them: their 8 KB are nobody's who does not ask
// (Linux, Documentation/arch/x86/xstate.rst).
#if defined(LMX_X86)
static bool may_use_tiles() {
#if defined(LMX_AMX)
    constexpr unsigned TILES = 1u << 24, BF16_TILES = 1u << 22;  // bits of EDX, leaf 7
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (TILES | BF16_TILES)) != (TILES | BF16_TILES)) return false;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}
#endif

static Level best_level() {
#if defined(LMX_X86)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16") &&
                        __builtin_cpu_supports("avx512vnni");
    if (avx512) return may_use_tiles() ? AMX : AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
    return PORTABLE;
#elif defined(LMX_NEON)
    return NEON;
#else
    return PORTABLE;
#endif
}

static Level& current() {
    static Level level = best_level();
    return level;
}

Level level() { return current(); }

bool has_large_first_cache() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
    static const bool large = sysconf(_SC_LEVEL1_DCACHE_SIZE) >= 48 << 10;
    return large || level() == AMX;
#else
    return level() == AMX;
#endif
}

}  // namespace lmx

// Bumped when a signature changes: a library of another version is not used.
LMX_EXPORT int lmx_abi() { return 10; }

LMX_EXPORT int lmx_level() { return lmx::current(); }

// Take another path; -1 goes back to the best. Returns the path in use: a path that the CPU lacks is refused.
LMX_EXPORT int lmx_set_level(int level) {
    const lmx::Level best = lmx::best_level();
    const bool known = level == lmx::PORTABLE || level == best || (best == lmx::AVX512 && level == lmx::AVX2) ||
                       (best == lmx::AMX && (level == lmx::AVX2 || level == lmx::AVX512));
    if (level == -1) lmx::current() = best;
    else if (known) lmx::current() = static_cast<lmx::Level>(level);
    return lmx::current();
}

LMX_EXPORT int lmx_max_threads() {
#if defined(_OPENMP)
    return omp_get_max_threads();
#else
    return lmx::thread_count();
#endif
}

LMX_EXPORT void lmx_set_threads(int threads) {
#if defined(_OPENMP)
    (void)threads;  // torch sets the pool that both share
#else
    lmx::thread_count() = threads;
#endif
}
