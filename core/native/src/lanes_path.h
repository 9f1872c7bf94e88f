// All kernels of one path; see floats.h for what the including file says of it.
#include "lanes.h"

#include "floats.h"

#include "norm_path.h"
