// Threads: OpenMP, bound to the library that torch brought; libdispatch on macOS, whose compilers have no OpenMP.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#elif defined(__APPLE__)
#include <dispatch/dispatch.h>
#endif

namespace lmx {

#if !defined(_OPENMP)
inline int& thread_count() {
    static int count = 1;
    return count;
}
#endif

template <typename Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
    if (count <= 0) return;
    grain = std::max<int64_t>(grain, 1);
    const int64_t units = (count + grain - 1) / grain;
    auto part = [&](int64_t index, int64_t parts) {
        const int64_t first = units * index / parts * grain, last = std::min(units * (index + 1) / parts * grain, count);
        if (first < last) body(first, last);
    };
#if defined(_OPENMP)
    const int64_t parts = omp_in_parallel() ? 1 : std::min<int64_t>(omp_get_max_threads(), units);
    if (parts <= 1) {
        body(0, count);
        return;
    }
#pragma omp parallel num_threads(static_cast<int>(parts))
    part(omp_get_thread_num(), omp_get_num_threads());
#elif defined(__APPLE__)
    struct Job {
        decltype(part)* run;
        int64_t parts;
    } job{&part, std::min<int64_t>(thread_count(), units)};
    dispatch_apply_f(job.parts, DISPATCH_APPLY_AUTO, &job, [](void* raw, size_t index) {
        Job* job = static_cast<Job*>(raw);
        (*job->run)(static_cast<int64_t>(index), job->parts);
    });
#else
    part(0, 1);
#endif
}

// Calls body(i) for every i below count, one after another on whichever thread is free: for items of uneven cost.
template <typename Body>
void parallel_each(int64_t count, const Body& body) {
#if defined(_OPENMP)
    const int parts = omp_in_parallel() ? 1 : static_cast<int>(std::min<int64_t>(omp_get_max_threads(), count));
    if (parts > 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(parts)
        for (int64_t i = 0; i < count; ++i) body(i);
        return;
    }
    for (int64_t i = 0; i < count; ++i) body(i);
#else
    parallel_for(count, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) body(i);
    });
#endif
}

}  // namespace lmx
