#include "logits_gradient.cuh"

template void megatron_rlvr::launch_logits_gradient<__nv_bfloat16>(const LogitsGradientArguments&, const RowLaunch&);
