#include "vector_baseline.h"

#include "row_kernels.h"  // written in terms of the Vector above

namespace megatron_rlvr::cpu {
const RowKernels kBaselineKernels = {"cpu", row_statistics, logits_gradient};
}
