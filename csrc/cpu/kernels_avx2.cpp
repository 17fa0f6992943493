#include "vector_avx2.h"

#include "row_kernels.h"  // written in terms of the Vector above

namespace megatron_rlvr::cpu {
const RowKernels kAvx2Kernels = {"cpu-avx2", row_statistics, logits_gradient};
}
