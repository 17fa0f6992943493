// Sums and row statistics over the threads of a warp and of a block.
#pragma once
#include "online_statistics.cuh"
#include "platform.cuh"

namespace megatron_rlvr {

template <bool kSecondMoments>
__device__ __forceinline__ RowSums<float> shuffled(const RowSums<float>& sums, int lane_mask) {
  RowSums<float> out;
  out.maximum = __shfl_xor_sync(kWholeWarp, sums.maximum, lane_mask);
  out.excess = __shfl_xor_sync(kWholeWarp, sums.excess, lane_mask);
  out.exponential_x = __shfl_xor_sync(kWholeWarp, sums.exponential_x, lane_mask);
  if (kSecondMoments) {
    out.squared_excess = __shfl_xor_sync(kWholeWarp, sums.squared_excess, lane_mask);
    out.squared_x = __shfl_xor_sync(kWholeWarp, sums.squared_x, lane_mask);
  }
  return out;
}

// Lane 0 gets the statistics of the whole warp.
template <bool kSecondMoments>
__device__ __forceinline__ RowSums<float> warp_merged(RowSums<float> sums, float inverse_temperature) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    sums = merged<kSecondMoments>(sums, shuffled<kSecondMoments>(sums, distance), inverse_temperature);
  }
  return sums;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kWholeWarp, value, distance);
  }
  return value;
}

__device__ __forceinline__ int warp_sum(int value) { return __reduce_add_sync(kWholeWarp, value); }

// Every lane gets the statistics of the whole warp. The lanes must share a maximum.
template <bool kSecondMoments>
__device__ __forceinline__ RowSums<float> warp_summed(RowSums<float> sums) {
  sums.excess = warp_sum(sums.excess);
  sums.exponential_x = warp_sum(sums.exponential_x);
  if (kSecondMoments) {
    sums.squared_excess = warp_sum(sums.squared_excess);
    sums.squared_x = warp_sum(sums.squared_x);
  }
  return sums;
}

// Thread 0 gets the statistics of the whole block. Every thread of the block must call it, and only once per kernel: no
// barrier protects its shared memory from a second call.
template <bool kSecondMoments, int kMaximumThreads>
__device__ __forceinline__ RowSums<float> block_merged(const LaneSums& of_lane, float inverse_temperature) {
  __shared__ RowSums<float> of_warp[kMaximumThreads / kWarpSize];
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  const int warps = int(blockDim.x) / kWarpSize;
  RowSums<float> sums = warp_summed<kSecondMoments>(of_lane.sums);
  if (warps == 1) return sums;
  if (lane == 0) of_warp[warp] = sums;
  __syncthreads();
  if (warp == 0) {
    sums = lane < warps ? of_warp[lane] : RowSums<float>();
    sums = warp_merged<kSecondMoments>(sums, inverse_temperature);
  }
  return sums;
}

// Adds each of a block's counters to `totals`, with at most one atomic per counter. Every thread must call it, once.
template <int kCounters, int kMaximumThreads>
__device__ __forceinline__ void add_block_counts(const int (&counts)[kCounters], int64_t* totals) {
  __shared__ int of_warp[kMaximumThreads / kWarpSize][kCounters];
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  const int warps = int(blockDim.x) / kWarpSize;
#pragma unroll
  for (int counter = 0; counter < kCounters; ++counter) {
    const int sum = warp_sum(counts[counter]);
    if (lane == 0) of_warp[warp][counter] = sum;
  }
  __syncthreads();
  if (threadIdx.x < kCounters) {
    unsigned long long sum = 0;
    for (int i = 0; i < warps; ++i) sum += of_warp[i][threadIdx.x];
    if (sum != 0) atomicAdd(reinterpret_cast<unsigned long long*>(totals) + threadIdx.x, sum);
  }
}

}  // namespace megatron_rlvr
