// Kernels one after the other, without a caller's time between them.
#include "lmx_native.h"

namespace lmx {
namespace {

// A kernel that takes one structure, and which. As in core/native/tape.py.
struct Call {
    void (*kernel)(const void*);
    const void* structure;
};

}  // namespace
}  // namespace lmx

LMX_EXPORT void lmx_play(const lmx::Call* calls, int64_t count) {
    for (int64_t i = 0; i < count; ++i) calls[i].kernel(calls[i].structure);
}
