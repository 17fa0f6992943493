// The kernels that do a few scalar operations per row or token. They are compiled once, for the baseline: the logarithms
// and exponentials of the C library take most of their time, and calls to them from AVX-512 code are slower.
#include "../formulas.h"
#include "kernels.h"

namespace megatron_rlvr::cpu {
namespace {

// Lowers `*first` to `row`; other threads may do the same at the same time.
inline void report_row(int32_t* first, int64_t row) {
  int32_t current = __atomic_load_n(first, __ATOMIC_RELAXED);
  while (row < current &&
         !__atomic_compare_exchange_n(first, &current, int32_t(row), true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

// Merges shards in rank order, in float64, and rounds once, so that every rank gets the same bits.
template <bool kMoments>
void combine_statistics_of(const CombineStatisticsArguments& a, int64_t begin, int64_t end) {
  constexpr int64_t width = kMoments ? kPartialWidthWithMoments : kPartialWidth;
  for (int64_t row = begin; row < end; row++) {
    RowSums<double> sums;
    float target_logit = -INFINITY;
    for (int64_t shard = 0; shard < a.shards; shard++) {
      const float* partial = a.partials + (shard * a.rows + row) * width;
      RowSums<double> of_shard;
      of_shard.maximum = partial[kMaximum];
      of_shard.excess = partial[kExcess];
      of_shard.exponential_x = partial[kExponentialX];
      if (kMoments) {
        of_shard.squared_excess = partial[kSquaredExcess];
        of_shard.squared_x = partial[kSquaredX];
      }
      if (partial[kTargetLogit] > target_logit) target_logit = partial[kTargetLogit];
      sums = shard == 0 ? of_shard : merged<kMoments>(sums, of_shard, a.inverse_temperature);
    }
    const auto finished = finished_row<kMoments>(sums, target_logit, a.targets[row], a.inverse_temperature);
    a.logprob[row] = finished.logprob;
    a.entropy[row] = finished.entropy;
    float* state = a.state + row * kStateWidth;
    state[kStateMaximum] = finished.maximum;
    state[kStateLogSum] = finished.log_sum;
    state[kStateEntropy] = finished.entropy;
    state[kStateLogprob] = finished.logprob;
    if (kMoments) {
      a.moments[row] = finished.squared;
      a.moments[a.rows + row] = finished.squared_logprob;
    }
    if (!a.bad_rows) continue;
    if (!finished.is_normalisable) report_row(a.bad_rows, row);
    if (!is_valid_target(a.targets[row], a.vocabulary)) report_row(a.bad_rows + 1, row);
  }
}

}  // namespace

void combine_statistics(const CombineStatisticsArguments& a, int64_t begin, int64_t end) {
  if (a.second_moments)
    combine_statistics_of<true>(a, begin, end);
  else
    combine_statistics_of<false>(a, begin, end);
}

void clipped_objective(const ClippedObjectiveArguments& a, int64_t begin, int64_t end) {
  int64_t counts[kObjectiveCounts] = {};
  for (int64_t token = begin; token < end; token++) {
    TokenObjective result = {0.0f, 0.0f, Gate::kOpen};
    if (!a.mask || a.mask[token]) {
      const float logprob = a.logprob[token], old_logprob = a.old_logprob[token], advantage = a.advantage[token];
      const float weight = a.weight ? a.weight[token] : 1.0f;
      const RatioBounds bounds = a.low ? RatioBounds{a.low[token], a.high[token], a.dual_clip}
                                       : ratio_bounds(a.clip, expf(old_logprob), a.dual_clip);
      result = token_objective(log_ratio_of(logprob, old_logprob), advantage, weight, bounds);
      counts[kCountClippedHigh] += result.gate == Gate::kClippedHigh;
      counts[kCountClippedLow] += result.gate == Gate::kClippedLow;
      const int region = a.entropy ? entropy_region(logprob, a.entropy[token], advantage) : 0;
      if (region) counts[kCountRegion1 + region - 1]++;
    }
    a.objective[token] = result.objective;
    a.gradient[token] = result.gradient;
    if (a.gate) a.gate[token] = uint8_t(result.gate);
  }
  for (int i = 0; i < kObjectiveCounts; i++) __atomic_fetch_add(a.counts + i, counts[i], __ATOMIC_RELAXED);
}

}  // namespace megatron_rlvr::cpu
