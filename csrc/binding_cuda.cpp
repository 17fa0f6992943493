// Registers the operators for CUDA tensors, through torch's stable ABI. Work goes to the current stream and nothing
// waits for the device, so a call can be captured in a CUDA graph. With MEGATRON_RLVR_CHECK=1 in the environment,
// combine_statistics waits once per call, to name bad rows instead of returning NaN for them.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <cstring>

#include "cuda/launchers.h"
#include "kept_operators.h"

namespace megatron_rlvr {
namespace {

void check_status(const char* name, int error) {
  if (error) refuse(name, ": ", cudaGetErrorString(cudaError_t(error)));
}

// The current stream of a device. The function that returns it is in torch's stable interface since before 2.10, but
// only in the library of CUDA builds. Looking it up at run time lets this file link and load without that library.
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

bool checks_wanted() {
  static const char* value = std::getenv("MEGATRON_RLVR_CHECK");
  return value && std::strcmp(value, "1") == 0;
}

// Makes the tensor's device current for the call.
struct CudaBackend {
  torch::stable::accelerator::DeviceGuard guard;
  void* stream;
  int multiprocessors;

  explicit CudaBackend(const Tensor& tensor)
      : guard(tensor.get_device_index()), stream(current_stream(tensor.get_device_index())) {
    check_status("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount,
                                                                  tensor.get_device_index()));
  }

  // Looking at them would wait for the device: combine_statistics reports them instead.
  void check_targets(const int64_t*, int64_t, int64_t) const {}

  // A row whose set lacks its target gives NaN.
  void check_kept(const KeptSets&, const int64_t*, int64_t, int64_t) const {}

  int64_t workspace_floats(int64_t rows, int64_t vocabulary, bool second_moments) const {
    return megatron_rlvr_row_statistics_workspace(rows, vocabulary, second_moments, multiprocessors);
  }

  Tensor zeroed_counts(const Tensor& like) const {
    return torch::stable::new_zeros(like, {kObjectiveCounts}, ScalarType::Long);
  }

  void launch(const RowStatisticsArguments& a) const {
    check_status("row_statistics", megatron_rlvr_row_statistics(&a, multiprocessors));
  }
  void launch(const CombineStatisticsArguments& a) const {
    check_status("combine_statistics", megatron_rlvr_combine_statistics(&a));
  }
  void launch(const LogitsGradientArguments& a) const {
    check_status("logits_gradient", megatron_rlvr_logits_gradient(&a, multiprocessors));
  }
  void launch(const KeptRowStatisticsArguments& a) const {
    check_status("kept_row_statistics", megatron_rlvr_kept_row_statistics(&a));
  }
  void launch(const KeptLogitsGradientArguments& a) const {
    check_status("kept_logits_gradient", megatron_rlvr_kept_logits_gradient(&a));
  }
  void launch(const ClippedObjectiveArguments& a) const {
    check_status("clipped_objective", megatron_rlvr_clipped_objective(&a, multiprocessors));
  }

  // Checks only where MEGATRON_RLVR_CHECK=1 allows a wait for the device.
  class RowReport {
   public:
    RowReport(const CudaBackend&, const Tensor& like)
        : report_(new_tensor(like, {checks_wanted() ? 2 : 0}, aoti_torch_dtype_int32())) {
      if (checks_wanted()) torch::stable::fill_(report_, double(kNoBadRow));
    }

    int32_t* bad_rows() { return checks_wanted() ? static_cast<int32_t*>(report_.mutable_data_ptr()) : nullptr; }

    void check(const CombineStatisticsArguments& a) const {
      if (!checks_wanted()) return;
      int32_t bad[2];
      const auto stream = static_cast<cudaStream_t>(a.stream);
      check_status("row report", cudaMemcpyAsync(bad, a.bad_rows, sizeof bad, cudaMemcpyDeviceToHost, stream));
      check_status("row report", cudaStreamSynchronize(stream));
      if (bad[1] != kNoBadRow)
        refuse("targets: neither an id of the vocabulary nor ", kIgnoredTarget, " in row ", bad[1]);
      if (bad[0] != kNoBadRow) refuse("logits: NaN or +inf, or nothing above -inf, first in row ", bad[0]);
    }

   private:
    Tensor report_;
  };
};

}  // namespace
}  // namespace megatron_rlvr

STABLE_TORCH_LIBRARY_IMPL(megatron_rlvr, CUDA, m) {
  megatron_rlvr::register_operators<megatron_rlvr::CudaBackend>(m);
  megatron_rlvr::register_kept_operators<megatron_rlvr::CudaBackend>(m);
}
