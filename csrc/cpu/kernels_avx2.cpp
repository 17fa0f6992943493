#include "vector_avx2.h"

#include "row_kernels.h"  // in terms of the Vector above

namespace megatron_rlvr::cpu {
const Kernels kAvx2Kernels = {"cpu-avx2", row_statistics, logits_gradient};
}
