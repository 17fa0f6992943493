// The CUDA kernels as a binding calls them: plain C functions over the structs of kernel_arguments.h, no torch.
//
// Every launcher queues its work on the stream in its arguments, allocates nothing and never waits for the device, so
// a launch can be captured in a CUDA graph (scalars such as the clip thresholds are then part of the graph). The
// result is the cudaError_t of the launch, 0 for success; zero rows succeed without a launch.
#pragma once
#include <cstdint>

#include "../kernel_arguments.h"

extern "C" {
// Floats of workspace that the statistics of this shape need. Not 0 where rows are few and long, so that each is split.
// `multiprocessors` is the number of multiprocessors of the device that will run it.
int64_t megatron_rlvr_row_statistics_workspace(int64_t rows, int64_t vocabulary, bool second_moments,
                                               int multiprocessors);
// `multiprocessors` must be the number that the workspace was computed with.
int megatron_rlvr_row_statistics(const megatron_rlvr::RowStatisticsArguments* arguments, int multiprocessors);
int megatron_rlvr_combine_statistics(const megatron_rlvr::CombineStatisticsArguments* arguments);
int megatron_rlvr_logits_gradient(const megatron_rlvr::LogitsGradientArguments* arguments, int multiprocessors);
int megatron_rlvr_kept_row_statistics(const megatron_rlvr::KeptRowStatisticsArguments* arguments);
int megatron_rlvr_kept_logits_gradient(const megatron_rlvr::KeptLogitsGradientArguments* arguments);
int megatron_rlvr_clipped_objective(const megatron_rlvr::ClippedObjectiveArguments* arguments, int multiprocessors);
}
