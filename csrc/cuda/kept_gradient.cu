#include "kept_gradient.cuh"

using namespace megatron_rlvr;

extern "C" int megatron_rlvr_kept_logits_gradient(const KeptLogitsGradientArguments* arguments) {
  const KeptLogitsGradientArguments& a = *arguments;
  if (a.row.rows == 0 || a.row.vocabulary == 0) return 0;
  switch (a.row.logits_type) {
    case kFloat32: launch_kept_gradient<float>(a); break;
    case kBFloat16: launch_kept_gradient<__nv_bfloat16>(a); break;
    case kFloat16: launch_kept_gradient<__half>(a); break;
    default: return int(cudaErrorInvalidValue);
  }
  return launch_status();
}
