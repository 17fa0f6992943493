// Kernel 1: reads every logit of a shard once and reduces each row to four numbers (six with second moments).
#pragma once
#include "heuristics.h"
#include "launchers.h"
#include "memory.cuh"
#include "online_statistics.cuh"
#include "reductions.cuh"

namespace megatron_rlvr {

__host__ __device__ constexpr int64_t partial_width(bool second_moments) {
  return second_moments ? kPartialWidthWithMoments : kPartialWidth;
}

template <bool kSecondMoments>
__device__ __forceinline__ void store_partial(float* partial, const RowSums<float>& sums, float target_logit) {
  store(partial + kMaximum, sums.maximum);
  store(partial + kExcess, sums.excess);
  store(partial + kExponentialX, sums.exponential_x);
  store(partial + kTargetLogit, target_logit);
  if (kSecondMoments) {
    store(partial + kSquaredExcess, sums.squared_excess);
    store(partial + kSquaredX, sums.squared_x);
  }
}

template <bool kSecondMoments>
__device__ __forceinline__ RowSums<float> load_partial(const float* partial, float& target_logit) {
  RowSums<float> sums;
  sums.maximum = load_read_only(partial + kMaximum);
  sums.excess = load_read_only(partial + kExcess);
  sums.exponential_x = load_read_only(partial + kExponentialX);
  target_logit = load_read_only(partial + kTargetLogit);
  if (kSecondMoments) {
    sums.squared_excess = load_read_only(partial + kSquaredExcess);
    sums.squared_x = load_read_only(partial + kSquaredX);
  }
  return sums;
}

// Sums over columns [begin, end) of a row, spread over the lanes of the block's warps.
template <class Logit, bool kSecondMoments>
__device__ __forceinline__ LaneSums lane_sums(const Logit* row, int64_t begin, int64_t end, float inverse_temperature) {
  using Format = LogitFormat<Logit>;
  constexpr int per_vector = Format::kPerVector;
  constexpr int vectors_per_tile = kLogitsPerTile / per_vector;
  const int thread = int(threadIdx.x), threads = int(blockDim.x), lane = thread % kWarpSize;
  const VectorSpan span = vector_span(row, begin, end);
  const uint4* vectors = reinterpret_cast<const uint4*>(row + span.vector_begin());
  LaneSums sums;

  // All lanes of a warp must take part in every round, so the bound is that of its first lane.
  for (int first = thread; first - lane < span.vectors; first += threads * vectors_per_tile) {
    uint4 words[vectors_per_tile];
#pragma unroll
    for (int i = 0; i < vectors_per_tile; ++i) {  // issue all loads before the first use
      const int index = first + i * threads;
      constexpr unsigned padding = Format::kMinusInfinity;
      words[i] = index < span.vectors ? load_read_only(vectors + index) : make_uint4(padding, padding, padding, padding);
    }
    float logits[kLogitsPerTile];
#pragma unroll
    for (int i = 0; i < vectors_per_tile; ++i) decode_vector<Logit>(words[i], logits + i * per_vector);
    accumulate<kSecondMoments>(sums, logits, inverse_temperature);
  }

  static_assert(2 * per_vector <= kWarpSize, "one warp takes the row's head in its first lanes, then the tail");
  if (thread < kWarpSize) {
    const int in_tail = lane - per_vector;
    float logits[1] = {-INFINITY};
    if (lane < span.head) {
      logits[0] = Format::decode(load_read_only(element_address(row, span.begin + lane)));
    } else if (in_tail >= 0 && in_tail < span.tail) {
      logits[0] = Format::decode(load_read_only(element_address(row, span.tail_begin + in_tail)));
    }
    accumulate<kSecondMoments>(sums, logits, inverse_temperature);
  }
  return sums;
}

// Grid: rows * slices blocks. partials: [rows, slices, width].
template <class Logit, bool kSecondMoments>
__global__ void __launch_bounds__(kMaximumThreads)
    row_statistics_kernel(const Logit* __restrict__ logits, int64_t row_stride, int64_t vocabulary, int64_t slices,
                          int64_t slice_width, const int64_t* __restrict__ targets, int64_t vocabulary_start,
                          float inverse_temperature, float* __restrict__ partials) {
  const int64_t row = int64_t(blockIdx.x) / slices, slice = int64_t(blockIdx.x) % slices;
  const int64_t begin = slice * slice_width;
  const int64_t end = begin + slice_width < vocabulary ? begin + slice_width : vocabulary;
  const Logit* row_logits = logits + row * row_stride;

  const LaneSums of_lane = lane_sums<Logit, kSecondMoments>(row_logits, begin, end, inverse_temperature);
  const RowSums<float> sums = block_merged<kSecondMoments, kMaximumThreads>(of_lane, inverse_temperature);
  if (threadIdx.x == 0) {
    const int64_t target = load_read_only(reinterpret_cast<const long long*>(targets) + row);
    const int64_t column = target - vocabulary_start;
    const bool is_in_slice = target >= 0 && column >= begin && column < end;
    const float target_logit =
        is_in_slice ? LogitFormat<Logit>::decode(load_read_only(element_address(row_logits, column))) : -INFINITY;
    store_partial<kSecondMoments>(partials + blockIdx.x * partial_width(kSecondMoments), sums, target_logit);
  }
}

template <class Logit, bool kSecondMoments>
void launch_row_statistics(const RowStatisticsArguments& a, const RowLaunch& launch) {
  MEGATRON_RLVR_LAUNCH((row_statistics_kernel<Logit, kSecondMoments>), a.rows * launch.slices, launch.threads, a.stream,
                       static_cast<const Logit*>(a.logits), a.row_stride, a.vocabulary, launch.slices,
                       launch.slice_width, a.targets, a.vocabulary_start, float(a.inverse_temperature),
                       launch.slices == 1 ? a.partials : a.workspace);
}

// Instantiated by row_statistics_<type>.cu, in one file per type so that they compile in parallel.
template <class Logit>
void launch_row_statistics(const RowStatisticsArguments& a, const RowLaunch& launch) {
  if (a.second_moments) {
    launch_row_statistics<Logit, true>(a, launch);
  } else {
    launch_row_statistics<Logit, false>(a, launch);
  }
}

extern template void launch_row_statistics<float>(const RowStatisticsArguments&, const RowLaunch&);
extern template void launch_row_statistics<__nv_bfloat16>(const RowStatisticsArguments&, const RowLaunch&);
extern template void launch_row_statistics<__half>(const RowStatisticsArguments&, const RowLaunch&);

}  // namespace megatron_rlvr
