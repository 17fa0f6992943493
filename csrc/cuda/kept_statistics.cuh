// Kernel 1 under kept sets: reads the kept logits alone, each once, and reduces each row to the same numbers.
#pragma once
#include "../kept_sets.h"
#include "row_statistics.cuh"

namespace megatron_rlvr {

struct LoadReadOnly {
  __device__ __forceinline__ int32_t operator()(const int32_t* address) const { return load_read_only(address); }
  __device__ __forceinline__ int64_t operator()(const int64_t* address) const {
    return load_read_only(reinterpret_cast<const long long*>(address));
  }
};

// Grid: one block per row.
template <class Logit, bool kSecondMoments>
__global__ void __launch_bounds__(kKeptThreads) kept_statistics_kernel(KeptRowStatisticsArguments arguments) {
  using Format = LogitFormat<Logit>;
  const RowStatisticsArguments& a = arguments.row;
  const KeptSets& kept = arguments.kept;
  const int64_t row = int64_t(blockIdx.x);
  const int thread = int(threadIdx.x), lane = thread % kWarpSize;
  const float inverse_temperature = float(a.inverse_temperature);
  const Logit* logits = static_cast<const Logit*>(a.logits) + row * a.row_stride;
  __shared__ KeptRange shared_range;
  if (thread == 0) {
    shared_range = kept_between(kept, row, a.vocabulary_start, a.vocabulary_start + a.vocabulary, LoadReadOnly());
  }
  __syncthreads();
  const KeptRange range = shared_range;

  LaneSums of_lane;
  // All lanes of a warp must take part in every round, so the bound is that of its first lane.
  for (int64_t first = range.begin + thread; first - lane < range.end; first += kKeptThreads * kKeptIdsPerTile) {
    int64_t columns[kKeptIdsPerTile];
#pragma unroll
    for (int i = 0; i < kKeptIdsPerTile; ++i) {
      const int64_t position = first + i * kKeptThreads;
      columns[i] = position < range.end
                       ? column_of(load_read_only(kept.ids + position), a.vocabulary_start, a.vocabulary)
                       : -1;
    }
    float values[kKeptIdsPerTile];
#pragma unroll
    for (int i = 0; i < kKeptIdsPerTile; ++i) {
      values[i] =
          columns[i] >= 0 ? Format::decode(load_read_only(element_address(logits, columns[i]))) : -INFINITY;
    }
    accumulate<kSecondMoments>(of_lane, values, inverse_temperature);
  }
  RowSums<float> sums = block_merged<kSecondMoments, kKeptThreads>(of_lane, inverse_temperature);
  if (thread == 0) {
    const int64_t target = load_read_only(reinterpret_cast<const long long*>(a.targets) + row);
    const int64_t column = target - a.vocabulary_start;
    const bool is_here = target >= 0 && column >= 0 && column < a.vocabulary;
    if (is_here && !contains(kept, range, target, LoadReadOnly())) sums.maximum = NAN;
    const float target_logit = is_here ? Format::decode(load_read_only(element_address(logits, column))) : -INFINITY;
    store_partial<kSecondMoments>(a.partials + row * partial_width(kSecondMoments), sums, target_logit);
  }
}

template <class Logit>
void launch_kept_statistics(const KeptRowStatisticsArguments& a) {
  if (a.row.second_moments) {
    MEGATRON_RLVR_LAUNCH((kept_statistics_kernel<Logit, true>), a.row.rows, kKeptThreads, a.row.stream, a);
  } else {
    MEGATRON_RLVR_LAUNCH((kept_statistics_kernel<Logit, false>), a.row.rows, kKeptThreads, a.row.stream, a);
  }
}

}  // namespace megatron_rlvr
