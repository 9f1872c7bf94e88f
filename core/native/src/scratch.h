// Memory that a call needs while it runs, and that a thread keeps from call to call, aligned for the widest vectors.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace lmx {

// So many elements, in whole lines of the caches, and another line that may be read behind them.
template <typename Element>
size_t bytes_of(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(Element) + 127) / 64 * 64;
}

inline void* aligned_memory(size_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes)) std::abort();  // a few hundred KB: the machine has come to its end
    return memory;
}

// Of a thread until it ends.
template <typename Element>
class Kept {
public:
    explicit Kept(int64_t count) : memory_(aligned_memory(bytes_of<Element>(count))) {}
    ~Kept() { std::free(memory_); }
    Kept(const Kept&) = delete;
    Kept& operator=(const Kept&) = delete;
    Element* data() { return static_cast<Element*>(memory_); }

private:
    void* memory_;
};

// A thread's memory for calls, handed out and taken back from one end: a step of generation asks for some hundred pieces,
// and an allocator's own structures have left the caches each time, for the weights that passed.
class Stack {
public:
    // Null where there is no room.
    uint8_t* take(size_t bytes) {
        if (bytes > SIZE - used_) return nullptr;
        uint8_t* const at = memory_.data() + used_;
        used_ += bytes;
        return at;
    }
    void give_back(size_t bytes) { used_ -= bytes; }
    static Stack& mine() {
        static thread_local Stack stack;
        return stack;
    }

private:
    static constexpr size_t SIZE = 1 << 20;
    Kept<uint8_t> memory_{SIZE};
    size_t used_ = 0;
};

// For a variable of a function, or a part of one: what was made last ends first.
template <typename Element>
class Scratch {
public:
    explicit Scratch(int64_t count)
        : bytes_(bytes_of<Element>(count)), stack_(&Stack::mine()),
          memory_(stack_->take(bytes_)) {
        if (memory_) return;
        stack_ = nullptr;
        memory_ = aligned_memory(bytes_);
    }
    ~Scratch() {
        if (stack_) stack_->give_back(bytes_);
        else std::free(memory_);
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    Element* data() { return static_cast<Element*>(memory_); }

private:
    size_t bytes_;
    Stack* stack_;
    void* memory_;
};

}  // namespace lmx
