// The formulas with internal linkage, as `formulas`, for source files compiled for one instruction set.
//
// An ordinary inline function or template compiled for AVX-512 may become the one copy that the linker keeps, and would
// then run in the baseline kernels of a processor without AVX-512.
#pragma once
#include <cmath>
#include <cstdint>

#include "../kernel_arguments.h"  // outside the namespace: its types are those that the binding passes

namespace megatron_rlvr::cpu {
namespace {
namespace isolated {
#include "../formulas.h"
}
namespace formulas = isolated::megatron_rlvr;
}  // namespace
}  // namespace megatron_rlvr::cpu
