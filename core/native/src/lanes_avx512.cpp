// Norms, convolutions, scans and quantizing with AVX-512.
#include "lmx_native.h"

#if defined(LMX_X86)

#define LMX_TARGET LMX_AVX512
#define LMX_LANES 16
#include "lanes_path.h"

namespace lmx {

extern const Lanes avx512_lanes;
const Lanes avx512_lanes{finish, gate, soft_cap, add, norm, conv, scan, recurrence, four_bit, int8, squares,
                           largest, place, exponentials};

}  // namespace lmx

#endif
