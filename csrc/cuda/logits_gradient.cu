#include "logits_gradient.cuh"

using namespace megatron_rlvr;

extern "C" int megatron_rlvr_logits_gradient(const LogitsGradientArguments* arguments, int multiprocessors) {
  const LogitsGradientArguments& a = *arguments;
  if (a.rows == 0 || a.vocabulary == 0) return 0;
  const RowLaunch launch = gradient_launch(a.rows, a.vocabulary, multiprocessors);
  switch (a.logits_type) {
    case kFloat32: launch_logits_gradient<float>(a, launch); break;
    case kBFloat16: launch_logits_gradient<__nv_bfloat16>(a, launch); break;
    case kFloat16: launch_logits_gradient<__half>(a, launch); break;
    default: return int(cudaErrorInvalidValue);
  }
  return launch_status();
}
