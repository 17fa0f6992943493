#include "vector_baseline.h"

#include "row_kernels.h"   // written in terms of the Vector above
#include "kept_kernels.h"  // written in terms of those

namespace megatron_rlvr::cpu {
const RowKernels kBaselineKernels = {"cpu", row_statistics, logits_gradient, kept_row_statistics,
                                     kept_logits_gradient};
}
