// The operators of torch.ops.megatron_rlvr, for any backend: each checks its tensors, allocates its outputs, fills in
// the arguments of a kernel and launches it. binding_cpu.cpp and binding_cuda.cpp say how their backend launches.
//
// Schemas, fake kernels and autograd formulas are registered in Python, in megatron_rlvr/ops.
//
// A Backend is made for each call, from one of its tensors. It has
//   void* stream                                               where CUDA queues the work
//   void check_targets(targets, rows, vocabulary)              raises for a bad target, if looking costs no wait
//   void check_kept(kept, targets, rows, vocabulary)           likewise for kept sets (kept_operators.h)
//   int64_t workspace_floats(rows, vocabulary, second_moments) scratch memory of row_statistics
//   Tensor zeroed_counts(like)                                 int64 [kObjectiveCounts]
//   void launch(const ...Arguments&)                           one overload per kernel
//   class RowReport                                            memory for bad_rows(), and check(), which raises
#pragma once
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "binding_checks.h"

namespace megatron_rlvr {

inline RowStatisticsArguments row_arguments(const Tensor& logits, const Tensor& targets, int64_t vocab_start,
                                            double inverse_temperature, bool second_moments, const Tensor& partials) {
  RowStatisticsArguments a;
  a.logits = logits.const_data_ptr();
  a.logits_type = logits_type(logits);
  a.rows = logits.size(0);
  a.vocabulary = logits.size(1);
  a.row_stride = logits.stride(0);
  a.targets = ids(targets);
  a.vocabulary_start = vocab_start;
  a.inverse_temperature = inverse_temperature;
  a.second_moments = second_moments;
  a.partials = mutable_floats(partials);
  a.workspace = nullptr;
  return a;
}

template <class Backend>
Tensor row_statistics(const Tensor logits, const Tensor targets, int64_t vocab_start, int64_t vocab_size,
                      double inverse_temperature, bool second_moments) {
  check_logits(logits, targets);
  const Backend backend(logits);
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  backend.check_targets(ids(targets), rows, vocab_size);
  Tensor partials = new_floats(logits, {rows, second_moments ? kPartialWidthWithMoments : kPartialWidth});
  const int64_t scratch = backend.workspace_floats(rows, vocabulary, second_moments);
  std::optional<Tensor> workspace;
  if (scratch) workspace = new_floats(logits, {scratch});
  RowStatisticsArguments a = row_arguments(logits, targets, vocab_start, inverse_temperature, second_moments, partials);
  a.workspace = workspace ? mutable_floats(*workspace) : nullptr;
  a.stream = backend.stream;
  backend.launch(a);
  return partials;
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> combine_statistics(const Tensor gathered, const Tensor targets,
                                                              int64_t vocab_size, double inverse_temperature) {
  const bool second_moments = check_gathered(gathered, targets);
  const Backend backend(gathered);
  const int64_t rows = gathered.size(1);
  Tensor logprob = new_floats(gathered, {rows}), entropy = new_floats(gathered, {rows});
  Tensor state = new_floats(gathered, {rows, kStateWidth});
  Tensor moments = new_floats(gathered, {second_moments ? 2 : 0, rows});
  typename Backend::RowReport report(backend, gathered);
  CombineStatisticsArguments a;
  a.partials = floats("gathered", gathered, gathered.numel());
  a.shards = gathered.size(0);
  a.rows = rows;
  a.second_moments = second_moments;
  a.targets = ids(targets);
  a.vocabulary = vocab_size;
  a.inverse_temperature = inverse_temperature;
  a.logprob = mutable_floats(logprob);
  a.entropy = mutable_floats(entropy);
  a.state = mutable_floats(state);
  a.moments = second_moments ? mutable_floats(moments) : nullptr;
  a.bad_rows = report.bad_rows();
  a.stream = backend.stream;
  backend.launch(a);
  report.check(a);
  return {logprob, entropy, state, moments};
}

inline LogitsGradientArguments gradient_arguments(const Tensor& logits, const Tensor& gradient, const Tensor& targets,
                                                  const Tensor& state, const Tensor& grad_logprob,
                                                  const Tensor& grad_entropy, int64_t vocab_start,
                                                  double inverse_temperature) {
  const int64_t rows = logits.size(0);
  LogitsGradientArguments a;
  a.logits = logits.const_data_ptr();
  a.gradient = gradient.mutable_data_ptr();
  a.logits_type = logits_type(logits);
  a.rows = rows;
  a.vocabulary = logits.size(1);
  a.row_stride = logits.stride(0);
  a.gradient_row_stride = gradient.stride(0);
  a.targets = ids(targets);
  a.vocabulary_start = vocab_start;
  a.inverse_temperature = inverse_temperature;
  a.state = floats("state", state, rows * kStateWidth);
  a.gradient_logprob = floats("grad_logprob", grad_logprob, rows);
  a.gradient_entropy = floats("grad_entropy", grad_entropy, rows);
  return a;
}

template <class Backend>
void write_logits_gradient(const Tensor& logits, const Tensor& gradient, const Tensor& targets, const Tensor& state,
                           const Tensor& grad_logprob, const Tensor& grad_entropy, int64_t vocab_start,
                           double inverse_temperature) {
  check_logits(logits, targets);
  const Backend backend(logits);
  LogitsGradientArguments a = gradient_arguments(logits, gradient, targets, state, grad_logprob, grad_entropy,
                                                 vocab_start, inverse_temperature);
  a.stream = backend.stream;
  backend.launch(a);
}

template <class Backend>
Tensor logits_gradient(const Tensor logits, const Tensor targets, const Tensor state, const Tensor grad_logprob,
                       const Tensor grad_entropy, int64_t vocab_start, double inverse_temperature) {
  Tensor gradient = new_logits(logits);
  write_logits_gradient<Backend>(logits, gradient, targets, state, grad_logprob, grad_entropy, vocab_start,
                                 inverse_temperature);
  return gradient;
}

template <class Backend>
void logits_gradient_(Tensor logits, const Tensor targets, const Tensor state, const Tensor grad_logprob,
                      const Tensor grad_entropy, int64_t vocab_start, double inverse_temperature) {
  check_in_place(logits);
  write_logits_gradient<Backend>(logits, logits, targets, state, grad_logprob, grad_entropy, vocab_start,
                                 inverse_temperature);
}

// What the two objectives below return: objective, derivative, counts and gate.
using Objective = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using OptionalTensor = std::optional<Tensor>;

// Objective with the bounds that `a` already holds.
template <class Backend>
Objective launch_objective(ClippedObjectiveArguments a, const Tensor& logprob, const Tensor& old_logprob,
                           const Tensor& advantage, const OptionalTensor& mask, const OptionalTensor& weight,
                           const OptionalTensor& entropy, std::optional<double> dual_clip) {
  const Backend backend(logprob);
  const int64_t tokens = logprob.numel();
  a.logprob = floats("logprob", logprob, tokens);
  a.old_logprob = floats("old_logprob", old_logprob, tokens);
  a.advantage = floats("advantage", advantage, tokens);
  a.mask = optional_pointer<bool>("mask", mask, ScalarType::Bool, tokens);
  a.weight = optional_pointer<float>("weight", weight, ScalarType::Float, tokens);
  a.entropy = optional_pointer<float>("entropy", entropy, ScalarType::Float, tokens);
  a.tokens = tokens;
  a.dual_clip = dual_clip ? float(*dual_clip) : INFINITY;
  Tensor objective = new_floats(logprob, {tokens}), derivative = new_floats(logprob, {tokens});
  Tensor gate = new_tensor(logprob, {tokens}, aoti_torch_dtype_uint8());
  Tensor counts = backend.zeroed_counts(logprob);
  a.objective = mutable_floats(objective);
  a.gradient = mutable_floats(derivative);
  a.gate = static_cast<uint8_t*>(gate.mutable_data_ptr());
  a.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
  a.stream = backend.stream;
  backend.launch(a);
  return {objective, derivative, counts, gate};
}

template <class Backend>
Objective clipped_objective(const Tensor logprob, const Tensor old_logprob, const Tensor advantage,
                            const OptionalTensor mask, const OptionalTensor weight, const OptionalTensor entropy,
                            double upper_slope, double upper_intercept, double lower_slope, double lower_intercept,
                            std::optional<double> dual_clip) {
  ClippedObjectiveArguments a = {};
  a.clip = {float(lower_intercept), float(lower_slope), float(upper_intercept), float(upper_slope)};
  return launch_objective<Backend>(a, logprob, old_logprob, advantage, mask, weight, entropy, dual_clip);
}

template <class Backend>
Objective bounded_objective(const Tensor logprob, const Tensor old_logprob, const Tensor advantage, const Tensor low,
                            const Tensor high, const OptionalTensor mask, const OptionalTensor weight,
                            const OptionalTensor entropy, std::optional<double> dual_clip) {
  ClippedObjectiveArguments a = {};
  a.low = floats("low", low, logprob.numel());
  a.high = floats("high", high, logprob.numel());
  return launch_objective<Backend>(a, logprob, old_logprob, advantage, mask, weight, entropy, dual_clip);
}

template <class Backend, class Library>
void register_operators(Library& library) {
  library.impl("row_statistics", TORCH_BOX(&row_statistics<Backend>));
  library.impl("combine_statistics", TORCH_BOX(&combine_statistics<Backend>));
  library.impl("logits_gradient", TORCH_BOX(&logits_gradient<Backend>));
  library.impl("logits_gradient_", TORCH_BOX(&logits_gradient_<Backend>));
  library.impl("clipped_objective", TORCH_BOX(&clipped_objective<Backend>));
  library.impl("bounded_objective", TORCH_BOX(&bounded_objective<Backend>));
}

}  // namespace megatron_rlvr
