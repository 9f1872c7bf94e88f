// Norms, convolutions, scans and quantizing with AVX2 and FMA.
#include "lmx_native.h"

#if defined(LMX_X86)

#define LMX_TARGET LMX_AVX2
#define LMX_LANES 8
#include "lanes_path.h"

namespace lmx {

extern const Lanes avx2_lanes;
const Lanes avx2_lanes{finish, gate, soft_cap, add, norm, conv, scan, recurrence, four_bit, int8, squares,
                           largest, place, exponentials};

}  // namespace lmx

#endif
