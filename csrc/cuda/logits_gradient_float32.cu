#include "logits_gradient.cuh"

template void megatron_rlvr::launch_logits_gradient<float>(const LogitsGradientArguments&, const RowLaunch&);
