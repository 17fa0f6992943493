// Kernels of torch.ops.megatron_rlvr for CPU tensors, through torch's stable ABI: one built library serves several torch
// versions. Schemas, fake kernels and autograd formulas are registered in Python (megatron_rlvr/ops/library.py).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "binding_checks.h"
#include "cpu/kernels.h"
#include "formulas.h"

namespace megatron_rlvr {
namespace {

// Fewer logits than this for each thread are not worth waking it.
constexpr int64_t kLogitsPerThread = 32768;

template <class F>
void parallel_rows(int64_t rows, int64_t row_cost, const F& f) {
  if (rows == 0) return;
  const int64_t grain = std::max<int64_t>(1, kLogitsPerThread / std::max<int64_t>(1, row_cost));
  if (rows <= grain)
    f(0, rows);
  else
    torch::stable::parallel_for(0, rows, grain, f);
}

void check_targets(const int64_t* targets, int64_t rows, int64_t vocabulary) {
  for (int64_t row = 0; row < rows; row++)
    if (targets[row] != kIgnoredTarget && (targets[row] < 0 || targets[row] >= vocabulary))
      refuse("targets: must be ids in [0, ", vocabulary, ") or ", kIgnoredTarget, " for a row without target, found ",
             targets[row], " in row ", row);
}

Tensor row_statistics(const Tensor logits, const Tensor targets, int64_t vocab_start, int64_t vocab_size,
                      double inverse_temperature, bool second_moments) {
  check_logits(logits, targets);
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  cpu::RowStatisticsArguments a;
  a.targets = static_cast<const int64_t*>(targets.const_data_ptr());
  check_targets(a.targets, rows, vocab_size);
  Tensor partials = new_floats(logits, {rows, second_moments ? 6 : 4});
  a.logits = logits.const_data_ptr();
  a.logits_type = cpu::LogitsType(logits_type(logits));
  a.vocabulary = vocabulary;
  a.row_stride = logits.stride(0);
  a.vocabulary_start = vocab_start;
  a.inverse_temperature = float(inverse_temperature);
  a.second_moments = second_moments;
  a.partials = static_cast<float*>(partials.mutable_data_ptr());
  const auto kernel = cpu::kernels().row_statistics;
  parallel_rows(rows, vocabulary, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return partials;
}

// What finishing one row costs, in logits: a few logarithms.
constexpr int64_t kCombineCost = 64;

// The rows whose maximum or normaliser, in the row state, is no number.
[[noreturn]] void refuse_rows(const float* state, int64_t rows) {
  std::vector<int64_t> broken;
  for (int64_t row = 0; row < rows; row++)
    if (!std::isfinite(state[4 * row]) || !std::isfinite(state[4 * row + 1])) broken.push_back(row);
  std::string names;
  for (size_t i = 0; i < broken.size() && i < 8; i++) names += (i ? ", " : "") + std::to_string(broken[i]);
  refuse("logits: ", broken.size(), " of ", rows, " rows hold NaN or +inf, or nothing above -inf: rows ", names,
         broken.size() > 8 ? ", ..." : "");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> combine_statistics(const Tensor gathered, const Tensor targets, int64_t,
                                                              double inverse_temperature) {
  const bool moments = check_gathered(gathered, targets);
  const int64_t rows = gathered.size(1);
  const int64_t shards = gathered.size(0), width = gathered.size(2);
  Tensor logprob = new_floats(gathered, {rows}), entropies = new_floats(gathered, {rows});
  Tensor state = new_floats(gathered, {rows, 4}), second = new_floats(gathered, {moments ? 2 : 0, rows});
  const auto* partials = static_cast<const float*>(gathered.const_data_ptr());
  const auto* target = static_cast<const int64_t*>(targets.const_data_ptr());
  auto* out_logprob = static_cast<float*>(logprob.mutable_data_ptr());
  auto* out_entropy = static_cast<float*>(entropies.mutable_data_ptr());
  auto* out_state = static_cast<float*>(state.mutable_data_ptr());
  auto* out_moments = static_cast<float*>(second.mutable_data_ptr());
  const double scale = inverse_temperature;  // rounded to float32 only where it meets logits
  std::atomic<bool> any_broken = false;
  const auto combine = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      RowSums<double> sums;
      float target_logit = -INFINITY;
      for (int64_t shard = 0; shard < shards; shard++) {
        const float* p = partials + (shard * rows + row) * width;
        RowSums<double> part;
        part.maximum = p[0];
        part.excess = p[1];
        part.exponential_x = p[2];
        if (moments) {
          part.squared_excess = p[4];
          part.squared_x = p[5];
        }
        target_logit = std::max(target_logit, p[3]);
        sums = shard == 0 ? part : merged<true>(sums, part, scale);
      }
      if (!is_normalisable(sums)) any_broken = true;
      const double normaliser = log_normaliser(sums);
      out_entropy[row] = float(entropy(sums));
      out_logprob[row] =
          target[row] < 0 ? 0.0f : float(log_probability(double(target_logit), sums.maximum, normaliser, scale));
      out_state[4 * row] = float(sums.maximum);
      out_state[4 * row + 1] = float(normaliser);
      out_state[4 * row + 2] = out_entropy[row];
      out_state[4 * row + 3] = out_logprob[row];
      if (moments) {
        out_moments[row] = float(sum_squared_probability(sums));
        out_moments[rows + row] = float(sum_squared_probability_logprob(sums));
      }
    }
  };
  parallel_rows(rows, kCombineCost, combine);
  if (any_broken) refuse_rows(out_state, rows);
  return {logprob, entropies, state, second};
}

void write_gradient(const Tensor& logits, const Tensor& gradient, const Tensor& targets, const Tensor& state,
                    const Tensor& grad_logprob, const Tensor& grad_entropy, int64_t vocab_start,
                    double inverse_temperature) {
  check_logits(logits, targets);
  const int64_t rows = logits.size(0);
  check_floats("state", state, rows * 4);
  check_floats("grad_logprob", grad_logprob, rows);
  check_floats("grad_entropy", grad_entropy, rows);
  cpu::LogitsGradientArguments a;
  a.logits = logits.const_data_ptr();
  a.gradient = gradient.mutable_data_ptr();
  a.logits_type = cpu::LogitsType(logits_type(logits));
  a.vocabulary = logits.size(1);
  a.row_stride = logits.stride(0);
  a.gradient_row_stride = gradient.stride(0);
  a.targets = static_cast<const int64_t*>(targets.const_data_ptr());
  a.vocabulary_start = vocab_start;
  a.inverse_temperature = float(inverse_temperature);
  a.state = static_cast<const float*>(state.const_data_ptr());
  a.gradient_logprob = static_cast<const float*>(grad_logprob.const_data_ptr());
  a.gradient_entropy = static_cast<const float*>(grad_entropy.const_data_ptr());
  const auto kernel = cpu::kernels().logits_gradient;
  parallel_rows(rows, a.vocabulary, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

Tensor logits_gradient(const Tensor logits, const Tensor targets, const Tensor state, const Tensor grad_logprob,
                       const Tensor grad_entropy, int64_t vocab_start, double inverse_temperature) {
  Tensor gradient = new_logits(logits);
  write_gradient(logits, gradient, targets, state, grad_logprob, grad_entropy, vocab_start, inverse_temperature);
  return gradient;
}

void logits_gradient_(Tensor logits, const Tensor targets, const Tensor state, const Tensor grad_logprob,
                      const Tensor grad_entropy, int64_t vocab_start, double inverse_temperature) {
  check_in_place(logits);
  write_gradient(logits, logits, targets, state, grad_logprob, grad_entropy, vocab_start, inverse_temperature);
}

std::tuple<Tensor, Tensor, Tensor> clipped_objective_of(const Tensor logprob, const Tensor old_logprob,
                                                        const Tensor advantage, const std::optional<Tensor> mask,
                                                        const std::optional<Tensor> weight,
                                                        const std::optional<Tensor> entropies, double upper_slope,
                                                        double upper_intercept, double lower_slope,
                                                        double lower_intercept) {
  const int64_t tokens = logprob.numel();
  check_floats("logprob", logprob, tokens);
  check_floats("old_logprob", old_logprob, tokens);
  check_floats("advantage", advantage, tokens);
  const bool* kept = optional_pointer<bool>("mask", mask, ScalarType::Bool, tokens);
  const float* weights = optional_pointer<float>("weight", weight, ScalarType::Float, tokens);
  const float* entropy_of = optional_pointer<float>("entropy", entropies, ScalarType::Float, tokens);
  const auto* now = static_cast<const float*>(logprob.const_data_ptr());
  const auto* before = static_cast<const float*>(old_logprob.const_data_ptr());
  const auto* advantages = static_cast<const float*>(advantage.const_data_ptr());
  Tensor objective = new_floats(logprob, {tokens}), derivative = new_floats(logprob, {tokens});
  Tensor counts = new_tensor(logprob, {6}, aoti_torch_dtype_int64());
  auto* out_objective = static_cast<float*>(objective.mutable_data_ptr());
  auto* out_derivative = static_cast<float*>(derivative.mutable_data_ptr());
  auto* out_counts = static_cast<int64_t*>(counts.mutable_data_ptr());
  const ClipScalars clip = {float(lower_intercept), float(lower_slope), float(upper_intercept), float(upper_slope)};
  std::atomic<int64_t> total[6] = {};
  parallel_rows(tokens, 16, [&](int64_t begin, int64_t end) {  // a token costs about as much as 16 logits
    int64_t found[6] = {};
    for (int64_t i = begin; i < end; i++) {
      out_objective[i] = out_derivative[i] = 0.0f;
      if (kept && !kept[i]) continue;
      const float a = advantages[i], factor = weights ? weights[i] : 1.0f;
      const float ratio = expf(now[i] - before[i]);
      const RatioBounds bounds = ratio_bounds(clip, expf(before[i]));
      const Gate state = gate(ratio, a, bounds);
      out_objective[i] = factor * clipped_objective(ratio, a, bounds);
      out_derivative[i] = factor * objective_gradient(ratio, a, bounds);
      found[0] += state == Gate::kClippedHigh;
      found[1] += state == Gate::kClippedLow;
      const int region = entropy_of ? entropy_region(now[i], entropy_of[i], a) : 0;
      if (region) found[1 + region]++;
    }
    for (int k = 0; k < 6; k++) total[k].fetch_add(found[k], std::memory_order_relaxed);
  });
  for (int k = 0; k < 6; k++) out_counts[k] = total[k].load();
  return {objective, derivative, counts};
}

}  // namespace
}  // namespace megatron_rlvr

STABLE_TORCH_LIBRARY_IMPL(megatron_rlvr, CPU, m) {
  m.impl("row_statistics", TORCH_BOX(&megatron_rlvr::row_statistics));
  m.impl("combine_statistics", TORCH_BOX(&megatron_rlvr::combine_statistics));
  m.impl("logits_gradient", TORCH_BOX(&megatron_rlvr::logits_gradient));
  m.impl("logits_gradient_", TORCH_BOX(&megatron_rlvr::logits_gradient_));
  m.impl("clipped_objective", TORCH_BOX(&megatron_rlvr::clipped_objective_of));
}
