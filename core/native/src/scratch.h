// Memory that a call needs while it runs, aligned for the widest vectors.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace lmx {

template <typename Element>
class Scratch {
public:
    explicit Scratch(int64_t count) {
        const size_t bytes = (static_cast<size_t>(count) * sizeof(Element) + 127) / 64 * 64;
        if (posix_memalign(&memory_, 64, bytes)) std::abort();  // a few hundred KB: the machine has come to its end
    }
    ~Scratch() { std::free(memory_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    Element* data() { return static_cast<Element*>(memory_); }

private:
    void* memory_ = nullptr;
};

}  // namespace lmx
