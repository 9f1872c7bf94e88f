// Memory read as fast as it comes: the ceiling that products of matrices are measured against.
#include <atomic>

#include "deal.h"

using namespace lmx;

// Words that a page holds, that a line of the caches does, and pages that are read side by side: CPUs look ahead in each
// page by themselves.
constexpr int64_t PAGE = 512, LINE = 8, SIDE = 8, BLOCK = SIDE * PAGE;

// All bits of `words` words taken together, so that every one must be read; `words` is a multiple of eight pages.
LMX_EXPORT uint64_t lmx_read(const uint64_t* memory, int64_t words) {
    std::atomic<uint64_t> all{0};
    Deal deal(words, 64 * BLOCK);
    parallel_phases(words / BLOCK, [&](Share share) {
        uint64_t bits[LINE] = {};
        deal.run(share, [&](Share::Range range, bool) {
            for (const uint64_t* block = memory + range.first; block < memory + range.last; block += BLOCK)
                for (int64_t line = 0; line < PAGE; line += LINE)
                    for (int64_t page = 0; page < BLOCK; page += PAGE)
                        for (int64_t i = 0; i < LINE; ++i) bits[i] ^= block[page + line + i];
        });
        for (const uint64_t some : bits) all.fetch_xor(some, std::memory_order_relaxed);
    });
    return all.load();
}
