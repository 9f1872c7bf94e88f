// Root-mean-square norms: rows in parallel.
#include "lanes.h"

using namespace lmx;

LMX_EXPORT void lmx_rms_norm(const void* x, int x_dtype, int64_t x_stride, const void* weight, void* y, int y_dtype,
                             int64_t y_stride, int64_t rows, int64_t width, float eps, int offset) {
    const Norm n{x, weight, y, x_stride, y_stride, width, static_cast<Dtype>(x_dtype), eps, offset != 0};
    parallel_for(rows, 1 + (1 << 14) / width, [&](int64_t first, int64_t last) {
        lanes().norm(n, static_cast<Dtype>(y_dtype), first, last);
    });
}
