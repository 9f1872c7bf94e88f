// Sums: residuals and biases.
#include "lanes.h"

using namespace lmx;

LMX_EXPORT void lmx_add(const void* left, int left_dtype, const void* right, int right_dtype, int64_t right_stride,
                        void* sum, int sum_dtype, int64_t rows, int64_t width) {
    const Add a{left,  right, sum, right_stride, width, static_cast<Dtype>(left_dtype), static_cast<Dtype>(right_dtype),
                static_cast<Dtype>(sum_dtype)};
    parallel_for(rows, 1 + (1 << 16) / width, [&](int64_t first, int64_t last) { lanes().add(a, first, last); });
}
