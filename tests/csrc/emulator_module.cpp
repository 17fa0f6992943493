// The launchers of csrc/cuda, run by the emulator, as a Python module: addresses in, results in place.
#include <pybind11/pybind11.h>

#include "cuda/heuristics.h"
#include "cuda/launchers.h"
#include "simt.h"

namespace py = pybind11;
using namespace megatron_rlvr;

namespace {

template <class Type>
Type* pointer(uint64_t address) {
  return reinterpret_cast<Type*>(address);
}

void check(int status) {
  if (status != 0) throw std::runtime_error("launch failed with status " + std::to_string(status));
}

void row_statistics(uint64_t logits, int type, int64_t rows, int64_t vocabulary, int64_t row_stride, uint64_t targets,
                    int64_t vocabulary_start, double inverse_temperature, bool second_moments, uint64_t partials,
                    uint64_t workspace, int multiprocessors) {
  const RowStatisticsArguments arguments{
      pointer<void>(logits),  type,           rows,
      vocabulary,             row_stride,     pointer<int64_t>(targets),
      vocabulary_start,       inverse_temperature, second_moments,
      pointer<float>(partials), pointer<float>(workspace), nullptr};
  check(megatron_rlvr_row_statistics(&arguments, multiprocessors));
}

void combine_statistics(uint64_t partials, int64_t shards, int64_t rows, bool second_moments, uint64_t targets,
                        int64_t vocabulary, double inverse_temperature, uint64_t logprob, uint64_t entropy,
                        uint64_t state, uint64_t moments, uint64_t bad_rows) {
  const CombineStatisticsArguments arguments{
      pointer<float>(partials), shards,         rows,
      second_moments,           pointer<int64_t>(targets), vocabulary,
      inverse_temperature,      pointer<float>(logprob),   pointer<float>(entropy),
      pointer<float>(state),    pointer<float>(moments),   pointer<int32_t>(bad_rows),
      nullptr};
  check(megatron_rlvr_combine_statistics(&arguments));
}

void logits_gradient(uint64_t logits, uint64_t gradient, int type, int64_t rows, int64_t vocabulary,
                     int64_t row_stride, int64_t gradient_row_stride, uint64_t targets, int64_t vocabulary_start,
                     double inverse_temperature, uint64_t state, uint64_t gradient_logprob, uint64_t gradient_entropy,
                     int multiprocessors) {
  const LogitsGradientArguments arguments{pointer<void>(logits),
                                          pointer<void>(gradient),
                                          type,
                                          rows,
                                          vocabulary,
                                          row_stride,
                                          gradient_row_stride,
                                          pointer<int64_t>(targets),
                                          vocabulary_start,
                                          inverse_temperature,
                                          pointer<float>(state),
                                          pointer<float>(gradient_logprob),
                                          pointer<float>(gradient_entropy),
                                          nullptr};
  check(megatron_rlvr_logits_gradient(&arguments, multiprocessors));
}

void kept_row_statistics(uint64_t logits, int type, int64_t rows, int64_t vocabulary, int64_t row_stride,
                         uint64_t targets, uint64_t ids, int64_t count, uint64_t offsets, int64_t vocabulary_start,
                         double inverse_temperature, bool second_moments, uint64_t partials) {
  const KeptRowStatisticsArguments arguments{
      {pointer<void>(logits), type, rows, vocabulary, row_stride, pointer<int64_t>(targets), vocabulary_start,
       inverse_temperature, second_moments, pointer<float>(partials), nullptr, nullptr},
      {pointer<int32_t>(ids), count, pointer<int64_t>(offsets)}};
  check(megatron_rlvr_kept_row_statistics(&arguments));
}

void kept_logits_gradient(uint64_t logits, uint64_t gradient, int type, int64_t rows, int64_t vocabulary,
                          int64_t row_stride, int64_t gradient_row_stride, uint64_t targets, uint64_t ids, int64_t count,
                          uint64_t offsets, int64_t vocabulary_start, double inverse_temperature, uint64_t state,
                          uint64_t gradient_logprob, uint64_t gradient_entropy) {
  const KeptLogitsGradientArguments arguments{
      {pointer<void>(logits), pointer<void>(gradient), type, rows, vocabulary, row_stride, gradient_row_stride,
       pointer<int64_t>(targets), vocabulary_start, inverse_temperature, pointer<float>(state),
       pointer<float>(gradient_logprob), pointer<float>(gradient_entropy), nullptr},
      {pointer<int32_t>(ids), count, pointer<int64_t>(offsets)}};
  check(megatron_rlvr_kept_logits_gradient(&arguments));
}

void clipped_objective(uint64_t logprob, uint64_t old_logprob, uint64_t advantage, uint64_t mask, uint64_t weight,
                       uint64_t entropy, int64_t tokens, float lower_intercept, float lower_slope,
                       float upper_intercept, float upper_slope, uint64_t low, uint64_t high, float dual_clip,
                       uint64_t objective, uint64_t gradient, uint64_t gate, uint64_t counts, int multiprocessors) {
  const ClippedObjectiveArguments arguments{pointer<float>(logprob),
                                            pointer<float>(old_logprob),
                                            pointer<float>(advantage),
                                            pointer<bool>(mask),
                                            pointer<float>(weight),
                                            pointer<float>(entropy),
                                            tokens,
                                            {lower_intercept, lower_slope, upper_intercept, upper_slope},
                                            pointer<float>(low),
                                            pointer<float>(high),
                                            dual_clip,
                                            pointer<float>(objective),
                                            pointer<float>(gradient),
                                            pointer<uint8_t>(gate),
                                            pointer<int64_t>(counts),
                                            nullptr};
  check(megatron_rlvr_clipped_objective(&arguments, multiprocessors));
}

py::tuple as_tuple(const RowLaunch& launch) {
  return py::make_tuple(launch.threads, launch.slices, launch.slice_width);
}

}  // namespace

PYBIND11_MODULE(emulated_kernels, module) {
  module.def("row_statistics", &row_statistics);
  module.def("row_statistics_workspace", &megatron_rlvr_row_statistics_workspace);
  module.def("combine_statistics", &combine_statistics);
  module.def("logits_gradient", &logits_gradient);
  module.def("kept_row_statistics", &kept_row_statistics);
  module.def("kept_logits_gradient", &kept_logits_gradient);
  module.def("clipped_objective", &clipped_objective);
  module.def("statistics_launch", [](int64_t rows, int64_t width, int multiprocessors) {
    return as_tuple(statistics_launch(rows, width, multiprocessors, 2));
  });
  module.def("gradient_launch", [](int64_t rows, int64_t width, int multiprocessors) {
    return as_tuple(gradient_launch(rows, width, multiprocessors));
  });
  module.def("set_order", [](unsigned order) { simt::settings().order = order; });
  module.def("reset_traffic", [] { simt::traffic().loaded = simt::traffic().stored = 0; });
  module.def("traffic", [] {
    return py::make_tuple(simt::traffic().loaded, simt::traffic().stored);
  });
}
