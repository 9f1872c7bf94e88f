// Scans and short convolutions: rows and tiles of channels in parallel.
#include "lanes.h"

using namespace lmx;

static int64_t tiles(int64_t channels, int64_t size) { return (channels + size - 1) / size; }

LMX_EXPORT void lmx_scan(const Scan* scan, int dtype) {
    parallel_for(scan->batch * tiles(scan->inner, CHANNEL_GRAIN), 1, [&](int64_t first, int64_t last) {
        lanes().scan(*scan, static_cast<Dtype>(dtype), first, last);
    });
}

LMX_EXPORT void lmx_conv(const Conv* conv, int dtype) {
    parallel_for(conv->batch * tiles(conv->channels, CHANNEL_GRAIN), 1, [&](int64_t first, int64_t last) {
        lanes().conv(*conv, static_cast<Dtype>(dtype), first, last);
    });
}

LMX_EXPORT void lmx_recurrence(const Recurrence* r, int dtype) {
    const int64_t parts = r->batch * r->heads * tiles(r->width, RECURRENCE_TILE);
    parallel_for(parts, 1, [&](int64_t first, int64_t last) {
        lanes().recurrence(*r, static_cast<Dtype>(dtype), first, last);
    });
}
