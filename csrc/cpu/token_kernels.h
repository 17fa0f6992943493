// The clipped objective of every token, its gradient and the counts, in one pass over [tokens].
//
// Scalar code: a token costs two exponentials, and there is one token per row of logits. Compiled once per instruction
// set like the row kernels, so that all kernels of a set stand in one table.
#pragma once
#include "isolated_formulas.h"

namespace megatron_rlvr::cpu {
namespace {

void clipped_objective(const ClippedObjectiveArguments& a, int64_t begin, int64_t end) {
  int64_t counts[kObjectiveCounts] = {};
  for (int64_t token = begin; token < end; token++) {
    a.objective[token] = a.gradient[token] = 0.0f;
    if (a.gate) a.gate[token] = uint8_t(formulas::Gate::kOpen);
    if (a.mask && !a.mask[token]) continue;
    const float advantage = a.advantage[token], weight = a.weight ? a.weight[token] : 1.0f;
    const float ratio = expf(a.logprob[token] - a.old_logprob[token]);
    const auto bounds = a.low ? formulas::RatioBounds{a.low[token], a.high[token], a.dual_clip}
                              : formulas::ratio_bounds(a.clip, expf(a.old_logprob[token]), a.dual_clip);
    const auto result = formulas::token_objective(ratio, advantage, bounds);
    a.objective[token] = weight * result.objective;
    a.gradient[token] = weight * result.gradient;
    if (a.gate) a.gate[token] = uint8_t(result.gate);
    counts[kCountClippedHigh] += result.gate == formulas::Gate::kClippedHigh;
    counts[kCountClippedLow] += result.gate == formulas::Gate::kClippedLow;
    const int region = a.entropy ? formulas::entropy_region(a.logprob[token], a.entropy[token], advantage) : 0;
    if (region) counts[kCountRegion1 + region - 1]++;
  }
  for (int i = 0; i < kObjectiveCounts; i++) __atomic_fetch_add(a.counts + i, counts[i], __ATOMIC_RELAXED);
}

}  // namespace
}  // namespace megatron_rlvr::cpu
