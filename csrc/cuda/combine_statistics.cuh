// Kernel 2, in two forms: merges the partial statistics of the slices of a row, and those of the vocabulary shards of
// all ranks.
#pragma once
#include "launchers.h"
#include "memory.cuh"
#include "reductions.cuh"
#include "row_statistics.cuh"

namespace megatron_rlvr {

constexpr int kCombineThreads = 128;

// One warp per row: [rows, slices, width] to [rows, width].
template <bool kSecondMoments>
__global__ void __launch_bounds__(kCombineThreads)
    merge_slices_kernel(const float* __restrict__ slices_partials, int64_t rows, int64_t slices,
                        float inverse_temperature, float* __restrict__ partials) {
  constexpr int64_t width = partial_width(kSecondMoments);
  const int64_t row = int64_t(blockIdx.x) * (kCombineThreads / kWarpSize) + threadIdx.x / kWarpSize;
  const int lane = int(threadIdx.x) % kWarpSize;
  if (row >= rows) return;  // a whole warp

  RowSums<float> sums;
  float target_logit = -INFINITY;
  for (int64_t slice = lane; slice < slices; slice += kWarpSize) {
    float slice_target;
    const float* partial = slices_partials + (row * slices + slice) * width;
    const RowSums<float> other = load_partial<kSecondMoments>(partial, slice_target);
    sums = merged<kSecondMoments>(sums, other, inverse_temperature);
    target_logit = fmaxf(target_logit, slice_target);
  }
  sums = warp_merged<kSecondMoments>(sums, inverse_temperature);
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    target_logit = fmaxf(target_logit, __shfl_xor_sync(kWholeWarp, target_logit, distance));
  }
  if (lane == 0) store_partial<kSecondMoments>(partials + row * width, sums, target_logit);
}

__device__ __forceinline__ RowSums<double> widened(const RowSums<float>& sums) {
  RowSums<double> out;
  out.maximum = sums.maximum;
  out.excess = sums.excess;
  out.exponential_x = sums.exponential_x;
  out.squared_excess = sums.squared_excess;
  out.squared_x = sums.squared_x;
  return out;
}

// One thread per row: [shards, rows, width] to log-prob, entropy, state and moments. Computed in fp64, which is
// cheap for a few numbers per row, and rounded once. That leaves the whole error budget of log-probs (2e-6) to the sums
// over logits. Shards merge in rank order, so that every rank gets the same bits.
template <bool kSecondMoments>
__global__ void __launch_bounds__(kCombineThreads) combine_statistics_kernel(CombineStatisticsArguments a) {
  constexpr int64_t width = partial_width(kSecondMoments);
  const int64_t row = int64_t(blockIdx.x) * kCombineThreads + threadIdx.x;
  if (row >= a.rows) return;

  RowSums<double> sums;
  float target_logit = -INFINITY;
  for (int64_t shard = 0; shard < a.shards; ++shard) {
    float shard_target;
    const RowSums<float> other =
        load_partial<kSecondMoments>(a.partials + (shard * a.rows + row) * width, shard_target);
    sums = merged<kSecondMoments>(sums, widened(other), a.inverse_temperature);
    target_logit = fmaxf(target_logit, shard_target);
  }

  const int64_t target = load_read_only(reinterpret_cast<const long long*>(a.targets) + row);
  const FinishedRow finished = finished_row<kSecondMoments>(sums, target_logit, target, a.inverse_temperature);
  store(a.logprob + row, finished.logprob);
  store(a.entropy + row, finished.entropy);
  store(reinterpret_cast<float4*>(a.state) + row,
        make_float4(finished.maximum, finished.log_sum, finished.entropy, finished.logprob));
  if (kSecondMoments) {
    store(a.moments + row, finished.squared);
    store(a.moments + a.rows + row, finished.squared_logprob);
  }
  if (a.bad_rows != nullptr) {
    if (!finished.is_normalisable) atomicMin(a.bad_rows, int(row));
    if (!is_valid_target(target, a.vocabulary)) atomicMin(a.bad_rows + 1, int(row));
  }
}

inline void launch_merge_slices(const RowStatisticsArguments& a, int64_t slices) {
  constexpr int64_t rows_per_block = kCombineThreads / kWarpSize;
  const int64_t blocks = (a.rows + rows_per_block - 1) / rows_per_block;
  if (a.second_moments) {
    MEGATRON_RLVR_LAUNCH((merge_slices_kernel<true>), blocks, kCombineThreads, a.stream, a.workspace, a.rows, slices,
                         float(a.inverse_temperature), a.partials);
  } else {
    MEGATRON_RLVR_LAUNCH((merge_slices_kernel<false>), blocks, kCombineThreads, a.stream, a.workspace, a.rows, slices,
                         float(a.inverse_temperature), a.partials);
  }
}

inline void launch_combine_statistics(const CombineStatisticsArguments& a) {
  const int64_t blocks = (a.rows + kCombineThreads - 1) / kCombineThreads;
  if (a.second_moments) {
    MEGATRON_RLVR_LAUNCH((combine_statistics_kernel<true>), blocks, kCombineThreads, a.stream, a);
  } else {
    MEGATRON_RLVR_LAUNCH((combine_statistics_kernel<false>), blocks, kCombineThreads, a.stream, a);
  }
}

}  // namespace megatron_rlvr
