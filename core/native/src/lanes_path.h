// All kernels of one path; see floats.h for what the including file says of it.
#include <algorithm>

#include "lanes.h"

#include "floats.h"

#include "add_path.h"
#include "conv_path.h"
#include "finish_path.h"
#include "norm_path.h"
#include "pick_path.h"
#include "quantize_path.h"
#include "recurrence_path.h"
#include "scan_path.h"
