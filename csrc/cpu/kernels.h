// The CPU kernels as the binding calls them: one table of functions per instruction set, chosen at run time.
//
// Every function works on the rows or tokens [begin, end), so that the caller can give a range to each of its threads.
// Pointers are host memory. Nothing is checked, allocated or thrown.
#pragma once
#include "../kernel_arguments.h"

namespace megatron_rlvr::cpu {

struct Kernels {
  const char* name;  // what ops.backend() reports
  void (*row_statistics)(const RowStatisticsArguments&, int64_t begin, int64_t end);
  void (*combine_statistics)(const CombineStatisticsArguments&, int64_t begin, int64_t end);
  void (*logits_gradient)(const LogitsGradientArguments&, int64_t begin, int64_t end);
  void (*clipped_objective)(const ClippedObjectiveArguments&, int64_t begin, int64_t end);
};

extern const Kernels kAvx512Kernels, kAvx2Kernels, kBaselineKernels;

// The widest kernels that this processor runs. MEGATRON_RLVR_CPU=avx512|avx2|baseline in the environment limits them.
const Kernels& kernels();

}  // namespace megatron_rlvr::cpu
