// Which path's norms, convolutions, scans and quantizers to call.
#include "lanes.h"

namespace lmx {

extern const Lanes portable_lanes;
#if defined(LMX_X86)
extern const Lanes avx2_lanes, avx512_lanes;
#endif

const Lanes& lanes() {
#if defined(LMX_X86)
    if (has_avx512()) return avx512_lanes;
    if (level() == AVX2) return avx2_lanes;
#endif
    return portable_lanes;
}

}  // namespace lmx
