// The work of one phase, dealt out among its threads while they run.
#pragma once

#include <atomic>

#include "phases.h"

namespace lmx {

// [0, count) in units of `grain`. Each thread has the range that share.of gives it and takes from its front, half of what is
// left at a time, so that most of it is read in one go. Who has none left takes from the ends of the others' ranges, by halves
// too: a core that others slow down costs the time of its last unit, not of its share. For one run.
class Deal {
public:
    Deal(int64_t count, int64_t grain) : count_(count), grain_(grain) {}

    // Calls body(range, more) until nothing is left. more: what this thread takes next most likely begins where `range` ends.
    template <typename Body>
    void run(Share share, const Body& body) {
        if (share.parts == 1 || share.parts > MOST_PARTS) {
            const Share::Range all = share.of(count_, grain_);
            if (all.first < all.last) body(all, false);
            return;
        }
        for (int64_t i = 0; i < share.parts; ++i) {
            const Share owner{(share.index + i) % share.parts, share.parts};
            const Share::Range all = owner.of(count_, grain_);
            const auto units = static_cast<uint32_t>((all.last - all.first + grain_ - 1) / grain_);
            const auto next = [&] { return claim(taken_[owner.index], units, i == 0); };
            for (Units some = next(); some.count; some = next()) {
                const int64_t first = all.first + some.first * grain_;
                const int64_t last = std::min(first + some.count * grain_, all.last);
                body(Share::Range{first, last}, i == 0 && last < all.last);
            }
        }
    }

private:
    static constexpr int64_t MOST_PARTS = 64;
    struct Units {
        uint32_t first, count;
    };
    // How many units of a range were taken from either end; nothing else passes between threads by it.
    using Taken = std::atomic<uint64_t>;

    static Units claim(Taken& taken, uint32_t units, bool front) {
        uint64_t before = taken.load(std::memory_order_relaxed);
        for (;;) {
            const auto from_front = static_cast<uint32_t>(before), from_back = static_cast<uint32_t>(before >> 32);
            const uint32_t count = (units - from_front - from_back + 1) / 2;
            const uint64_t after = before + (front ? uint64_t{count} : uint64_t{count} << 32);
            if (!count) return {0, 0};
            if (taken.compare_exchange_weak(before, after, std::memory_order_relaxed))
                return {front ? from_front : units - from_back - count, count};
        }
    }

    const int64_t count_, grain_;
    Taken taken_[MOST_PARTS] = {};
};

}  // namespace lmx
