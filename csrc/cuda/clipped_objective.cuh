// Kernel 4: the clipped objective of every token, its gradient, its gate and the counts, in one pass over [tokens].
#pragma once
#include <algorithm>

#include "launchers.h"
#include "memory.cuh"
#include "reductions.cuh"

namespace megatron_rlvr {

constexpr int kObjectiveThreads = 256;

__global__ void __launch_bounds__(kObjectiveThreads) clipped_objective_kernel(ClippedObjectiveArguments a) {
  int counts[kObjectiveCounts] = {};
  for (int64_t token = int64_t(blockIdx.x) * kObjectiveThreads + threadIdx.x; token < a.tokens;
       token += int64_t(gridDim.x) * kObjectiveThreads) {
    TokenObjective result = {0.0f, 0.0f, Gate::kOpen};
    const bool is_kept =
        a.mask == nullptr || load_read_only(reinterpret_cast<const unsigned char*>(a.mask) + token) != 0;
    if (is_kept) {
      const float logprob = load_read_only(a.logprob + token);
      const float old_logprob = load_read_only(a.old_logprob + token);
      const float advantage = load_read_only(a.advantage + token);
      const float weight = a.weight == nullptr ? 1.0f : load_read_only(a.weight + token);
      RatioBounds bounds;
      if (a.low == nullptr) {
        bounds = ratio_bounds(a.clip, expf(old_logprob), a.dual_clip);
      } else {
        bounds = {load_read_only(a.low + token), load_read_only(a.high + token), a.dual_clip};
      }
      result = token_objective(log_ratio_of(logprob, old_logprob), advantage, weight, bounds);
      counts[kCountClippedHigh] += result.gate == Gate::kClippedHigh;
      counts[kCountClippedLow] += result.gate == Gate::kClippedLow;
      if (a.entropy != nullptr) {
        const int region = entropy_region(logprob, load_read_only(a.entropy + token), advantage);
#pragma unroll
        for (int i = 1; i <= 4; ++i) counts[kCountRegion1 + i - 1] += region == i;
      }
    }
    store(a.objective + token, result.objective);
    store(a.gradient + token, result.gradient);
    if (a.gate != nullptr) store(a.gate + token, static_cast<unsigned char>(result.gate));
  }
  add_block_counts<kObjectiveCounts, kObjectiveThreads>(counts, a.counts);
}

inline void launch_clipped_objective(const ClippedObjectiveArguments& a, int multiprocessors) {
  const int64_t blocks = (a.tokens + kObjectiveThreads - 1) / kObjectiveThreads;
  // No more blocks than the device holds at once, because each block adds its counts with atomic operations.
  const int64_t max_blocks = 8 * int64_t(multiprocessors);
  MEGATRON_RLVR_LAUNCH(clipped_objective_kernel, std::min(blocks, max_blocks), kObjectiveThreads, a.stream, a);
}

}  // namespace megatron_rlvr
