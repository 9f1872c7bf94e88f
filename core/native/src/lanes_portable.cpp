// Norms, convolutions, scans and quantizing on any CPU; four lanes are one register of SSE2 and of NEON.
#include "lmx_native.h"

#define LMX_TARGET
#define LMX_LANES 4
#include "lanes_path.h"

namespace lmx {

extern const Lanes portable_lanes;
const Lanes portable_lanes{finish, gate, soft_cap, add, norm, conv, scan, recurrence, four_bit, int8, squares,
                           largest, place, exponentials};

}  // namespace lmx
