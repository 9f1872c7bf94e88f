// Which instructions this CPU has, and which path the kernels take.
#include "lmx_native.h"

namespace lmx {

static Level best_level() {
#if defined(LMX_X86)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16") &&
                        __builtin_cpu_supports("avx512vnni");
    if (avx512) return AVX512;
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

}  // namespace lmx

// Bumped when a signature changes: a library of another version is not used.
LMX_EXPORT int lmx_abi() { return 6; }

LMX_EXPORT int lmx_level() { return lmx::current(); }

// Take another path; -1 goes back to the best. Returns the path in use: a path that the CPU lacks is refused.
LMX_EXPORT int lmx_set_level(int level) {
    const lmx::Level best = lmx::best_level();
    const bool known = level == lmx::PORTABLE || level == best || (level == lmx::AVX2 && best == lmx::AVX512);
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
