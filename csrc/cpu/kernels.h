// The CPU kernels as the binding calls them.
//
// Every function works on the rows or tokens [begin, end), so that the caller can give a range to each of its threads.
// Pointers are host memory. Nothing is checked, allocated or thrown.
#pragma once
#include "../kernel_arguments.h"

namespace megatron_rlvr::cpu {

// The kernels that read logits, for one instruction set.
struct RowKernels {
  const char* name;  // what ops.backend() reports
  void (*row_statistics)(const RowStatisticsArguments&, int64_t begin, int64_t end);
  void (*logits_gradient)(const LogitsGradientArguments&, int64_t begin, int64_t end);
  void (*kept_row_statistics)(const KeptRowStatisticsArguments&, int64_t begin, int64_t end);
  void (*kept_logits_gradient)(const KeptLogitsGradientArguments&, int64_t begin, int64_t end);
};

extern const RowKernels kAvx512Kernels, kAvx2Kernels, kBaselineKernels;

// The widest kernels that this processor runs. MEGATRON_RLVR_CPU=avx512|avx2|baseline in the environment limits them.
const RowKernels& row_kernels();

void combine_statistics(const CombineStatisticsArguments&, int64_t begin, int64_t end);
void clipped_objective(const ClippedObjectiveArguments&, int64_t begin, int64_t end);

}  // namespace megatron_rlvr::cpu
