#include "clipped_objective.cuh"

using namespace megatron_rlvr;

extern "C" int megatron_rlvr_clipped_objective(const ClippedObjectiveArguments* arguments, int multiprocessors) {
  if (arguments->tokens == 0) return 0;
  launch_clipped_objective(*arguments, multiprocessors);
  return launch_status();
}
