#include "logits_gradient.cuh"

template void megatron_rlvr::launch_logits_gradient<__half>(const LogitsGradientArguments&, const RowLaunch&);
