// Root-mean-square norms: rows in parallel.
#include "lanes.h"

using namespace lmx;

namespace {

// As in core/native/norm.py.
struct NormRows {
    Norm norm;
    Dtype dtype;
    int64_t rows;
};

}  // namespace

LMX_EXPORT void lmx_rms_norm(const void* rows) {
    const auto& n = *static_cast<const NormRows*>(rows);
    parallel_for(n.rows, 1 + (1 << 14) / n.norm.width,
                 [&](int64_t first, int64_t last) { lanes().norm(n.norm, n.dtype, first, last); });
}
