// Chooses the instruction set of the CPU kernels at run time.
#include "kernels.h"

#include <cstdlib>
#include <cstring>

namespace megatron_rlvr::cpu {
namespace {

const RowKernels& widest_supported() {
#if defined(MEGATRON_RLVR_X86)
  const char* limit = std::getenv("MEGATRON_RLVR_CPU");
  const bool avx2_at_most = limit && std::strcmp(limit, "avx2") == 0;
  const bool baseline_only = limit && std::strcmp(limit, "baseline") == 0;
  if (baseline_only) return kBaselineKernels;
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && !avx2_at_most) return kAvx512Kernels;
  if (avx2) return kAvx2Kernels;
#endif
  return kBaselineKernels;
}

}  // namespace

const RowKernels& row_kernels() {
  static const RowKernels& chosen = widest_supported();
  return chosen;
}

}  // namespace megatron_rlvr::cpu

extern "C" __attribute__((visibility("default"))) const char* megatron_rlvr_cpu_backend() {
  return megatron_rlvr::cpu::row_kernels().name;
}
