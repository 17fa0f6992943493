#include "kept_statistics.cuh"

using namespace megatron_rlvr;

extern "C" int megatron_rlvr_kept_row_statistics(const KeptRowStatisticsArguments* arguments) {
  const KeptRowStatisticsArguments& a = *arguments;
  if (a.row.rows == 0) return 0;
  switch (a.row.logits_type) {
    case kFloat32: launch_kept_statistics<float>(a); break;
    case kBFloat16: launch_kept_statistics<__nv_bfloat16>(a); break;
    case kFloat16: launch_kept_statistics<__half>(a); break;
    default: return int(cudaErrorInvalidValue);
  }
  return launch_status();
}
