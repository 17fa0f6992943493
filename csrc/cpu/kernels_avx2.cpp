#include "vector_avx2.h"

#include "row_kernels.h"  // written in terms of the Vector above
#include "token_kernels.h"

namespace megatron_rlvr::cpu {
const Kernels kAvx2Kernels = {"cpu-avx2", row_statistics, combine_statistics, logits_gradient, clipped_objective};
}
