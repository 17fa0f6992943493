#include "vector_baseline.h"

#include "row_kernels.h"  // in terms of the Vector above

namespace megatron_rlvr::cpu {
const Kernels kBaselineKernels = {"cpu", row_statistics, logits_gradient};
}
