// Kernels of torch.ops.megatron_rlvr for CUDA tensors, through torch's stable ABI. Launches go to the current stream, and
// nothing waits for the device, so that all of it may be captured in a CUDA graph. MEGATRON_RLVR_CHECK=1 in the
// environment asks for one wait a call of combine_statistics, to name bad rows instead of giving NaN for them.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <cstring>
#include <optional>
#include <tuple>

#include "binding_checks.h"
#include "cuda/launchers.h"

namespace megatron_rlvr {
namespace {

void check_launch(const char* name, int error) {
  if (error) refuse(name, ": ", cudaGetErrorString(cudaError_t(error)));
}

// The stream that torch has current on a device. Torch's stable interface has had this function since before 2.10, in the
// library that only its CUDA builds have: looked up there, so that this file links, and loads, without it.
void* current_stream(int32_t device) {
  using Lookup = AOTITorchError (*)(int32_t, void**);
  static const auto lookup = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch_cuda ? reinterpret_cast<Lookup>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  if (!lookup) refuse("CUDA: the loaded torch has no libtorch_cuda.so with aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(lookup(device, &stream));
  return stream;
}

// The device of a call: its tensors', made current, with its current stream.
struct Device {
  torch::stable::accelerator::DeviceGuard guard;
  void* stream;
  int multiprocessors;

  explicit Device(const Tensor& tensor)
      : guard(tensor.get_device_index()),
        stream(current_stream(tensor.get_device_index())) {
    check_launch("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount,
                                                                  tensor.get_device_index()));
  }
};

bool checks_wanted() {
  static const char* value = std::getenv("MEGATRON_RLVR_CHECK");
  return value && std::strcmp(value, "1") == 0;
}

const int64_t* ids(const Tensor& targets) { return static_cast<const int64_t*>(targets.const_data_ptr()); }
const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }
float* mutable_floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

Tensor row_statistics(const Tensor logits, const Tensor targets, int64_t vocab_start, int64_t, double inverse_temperature,
                      bool second_moments) {
  check_logits(logits, targets);
  const Device device(logits);
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  Tensor partials = new_floats(logits, {rows, second_moments ? kPartialWidthWithMoments : kPartialWidth});
  const int64_t scratch =
      megatron_rlvr_row_statistics_workspace(rows, vocabulary, second_moments, device.multiprocessors);
  Tensor workspace = new_floats(logits, {scratch});
  RowStatisticsArguments a;
  a.logits = logits.const_data_ptr();
  a.logits_type = logits_type(logits);
  a.rows = rows;
  a.vocabulary = vocabulary;
  a.row_stride = logits.stride(0);
  a.targets = ids(targets);
  a.vocabulary_start = vocab_start;
  a.inverse_temperature = inverse_temperature;
  a.second_moments = second_moments;
  a.partials = mutable_floats(partials);
  a.workspace = scratch ? mutable_floats(workspace) : nullptr;
  a.stream = device.stream;
  check_launch("row_statistics", megatron_rlvr_row_statistics(&a, device.multiprocessors));
  return partials;
}

// Waits for the device, and raises if it found a bad row.
void check_rows(const Tensor& report, const Device& device) {
  int32_t bad[2];
  const auto stream = static_cast<cudaStream_t>(device.stream);
  check_launch("report", cudaMemcpyAsync(bad, report.const_data_ptr(), sizeof bad, cudaMemcpyDeviceToHost, stream));
  check_launch("report", cudaStreamSynchronize(stream));
  if (bad[1] != kNoBadRow)
    refuse("targets: neither an id of the vocabulary nor ", kIgnoredTarget, " in row ", bad[1]);
  if (bad[0] != kNoBadRow) refuse("logits: NaN or +inf, or nothing above -inf, first in row ", bad[0]);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> combine_statistics(const Tensor gathered, const Tensor targets, int64_t vocab_size,
                                                              double inverse_temperature) {
  const bool moments = check_gathered(gathered, targets);
  const Device device(gathered);
  const int64_t rows = gathered.size(1);
  Tensor logprob = new_floats(gathered, {rows}), entropies = new_floats(gathered, {rows});
  Tensor state = new_floats(gathered, {rows, kStateWidth}), second = new_floats(gathered, {moments ? 2 : 0, rows});
  Tensor report = new_tensor(gathered, {2}, aoti_torch_dtype_int32());
  const bool checked = checks_wanted();
  if (checked) torch::stable::fill_(report, double(kNoBadRow));
  CombineStatisticsArguments a;
  a.partials = floats(gathered);
  a.shards = gathered.size(0);
  a.rows = rows;
  a.second_moments = moments;
  a.targets = ids(targets);
  a.vocabulary = vocab_size;
  a.inverse_temperature = inverse_temperature;
  a.logprob = mutable_floats(logprob);
  a.entropy = mutable_floats(entropies);
  a.state = mutable_floats(state);
  a.moments = moments ? mutable_floats(second) : nullptr;
  a.bad_rows = checked ? static_cast<int32_t*>(report.mutable_data_ptr()) : nullptr;
  a.stream = device.stream;
  check_launch("combine_statistics", megatron_rlvr_combine_statistics(&a));
  if (checked) check_rows(report, device);
  return {logprob, entropies, state, second};
}

void write_gradient(const Tensor& logits, const Tensor& gradient, const Tensor& targets, const Tensor& state,
                    const Tensor& grad_logprob, const Tensor& grad_entropy, int64_t vocab_start,
                    double inverse_temperature) {
  check_logits(logits, targets);
  const Device device(logits);
  const int64_t rows = logits.size(0);
  check_floats("state", state, rows * kStateWidth);
  check_floats("grad_logprob", grad_logprob, rows);
  check_floats("grad_entropy", grad_entropy, rows);
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
  a.state = floats(state);
  a.gradient_logprob = floats(grad_logprob);
  a.gradient_entropy = floats(grad_entropy);
  a.stream = device.stream;
  check_launch("logits_gradient", megatron_rlvr_logits_gradient(&a, device.multiprocessors));
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
  const Device device(logprob);
  Tensor objective = new_floats(logprob, {tokens}), derivative = new_floats(logprob, {tokens});
  Tensor counts = torch::stable::new_zeros(logprob, {kObjectiveCounts}, ScalarType::Long);
  ClippedObjectiveArguments a;
  a.logprob = floats(logprob);
  a.old_logprob = floats(old_logprob);
  a.advantage = floats(advantage);
  a.mask = optional_pointer<bool>("mask", mask, ScalarType::Bool, tokens);
  a.weight = optional_pointer<float>("weight", weight, ScalarType::Float, tokens);
  a.entropy = optional_pointer<float>("entropy", entropies, ScalarType::Float, tokens);
  a.tokens = tokens;
  a.clip = {float(lower_intercept), float(lower_slope), float(upper_intercept), float(upper_slope)};
  a.objective = mutable_floats(objective);
  a.gradient = mutable_floats(derivative);
  a.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
  a.stream = device.stream;
  check_launch("clipped_objective", megatron_rlvr_clipped_objective(&a, device.multiprocessors));
  return {objective, derivative, counts};
}

}  // namespace
}  // namespace megatron_rlvr

STABLE_TORCH_LIBRARY_IMPL(megatron_rlvr, CUDA, m) {
  m.impl("row_statistics", TORCH_BOX(&megatron_rlvr::row_statistics));
  m.impl("combine_statistics", TORCH_BOX(&megatron_rlvr::combine_statistics));
  m.impl("logits_gradient", TORCH_BOX(&megatron_rlvr::logits_gradient));
  m.impl("logits_gradient_", TORCH_BOX(&megatron_rlvr::logits_gradient_));
  m.impl("clipped_objective", TORCH_BOX(&megatron_rlvr::clipped_objective_of));
}
