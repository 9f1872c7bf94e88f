// Work in several phases, each of which needs all of the one before: one start of the threads, barriers in between.
#pragma once

#include "lmx_native.h"

namespace lmx {

// The part of the work that one of `parts` threads does.
struct Share {
    int64_t index, parts;

    // Its range of [0, count), cut at multiples of `grain`.
    struct Range {
        int64_t first, last;
    };
    Range of(int64_t count, int64_t grain) const {
        const int64_t units = (count + grain - 1) / grain;
        return {std::min(units * index / parts * grain, count), std::min(units * (index + 1) / parts * grain, count)};
    }
};

// Calls each phase(share) once for every share of at most `most`; all of a phase is done before the next begins.
template <typename... Phase>
void parallel_phases(int64_t most, const Phase&... phases) {
#if defined(_OPENMP)
    const auto wait = [] {
#pragma omp barrier
    };
    const int64_t parts = omp_in_parallel() ? 1 : std::min<int64_t>(omp_get_max_threads(), most);
    if (parts > 1) {
#pragma omp parallel num_threads(static_cast<int>(parts))
        {
            const Share share{omp_get_thread_num(), omp_get_num_threads()};
            bool begun = false;
            ((begun ? wait() : void(begun = true), phases(share)), ...);
        }
        return;
    }
    (phases(Share{0, 1}), ...);
#else
    // No promise is made that two parts run at the same time, so none may wait for another.
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(thread_count(), most));
    (parallel_for(parts, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) phases(Share{i, parts});
    }), ...);
#endif
}

}  // namespace lmx
