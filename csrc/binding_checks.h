// Checks of tensors before a kernel gets their raw pointers, and allocation of outputs; for both bindings.
//
// The Python functions check the user's arguments first, with more detailed messages. These checks protect callers of
// torch.ops.megatron_rlvr.* from reading outside a tensor.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "kernel_arguments.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // named otherwise up to torch 2.10
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace megatron_rlvr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] inline void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline LogitsType logits_type(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kFloat16;
    default: refuse("logits: must be float32, bfloat16 or float16");
  }
}

inline void check_logits(const Tensor& logits, const Tensor& targets) {
  if (logits.dim() != 2) refuse("logits: must be [T, V/tp], found ", logits.dim(), " dimensions");
  if (logits.size(1) < 1) refuse("logits: the vocabulary is empty");
  if (logits.stride(1) != 1 && logits.size(1) > 1) refuse("logits: column stride must be 1, found ", logits.stride(1));
  logits_type(logits);
  if (targets.scalar_type() != ScalarType::Long || targets.dim() != 1 || targets.size(0) != logits.size(0) ||
      !targets.is_contiguous())
    refuse("targets: must be contiguous int64 [", logits.size(0), "]");
}

inline void check_floats(const char* name, const Tensor& tensor, int64_t count) {
  if (tensor.scalar_type() != ScalarType::Float || !tensor.is_contiguous() || tensor.numel() != count)
    refuse(name, ": must be contiguous float32 with ", count, " elements, found ", tensor.numel());
}

inline void check_in_place(const Tensor& logits) {
  if (logits.size(0) > 1 && logits.stride(0) < logits.size(1))
    refuse("logits: rows overlap in memory (row stride ", logits.stride(0), "), the gradient cannot be written over them");
}

// Returns whether the gathered partials hold second moments.
inline bool check_gathered(const Tensor& gathered, const Tensor& targets) {
  const int64_t rows = targets.numel();
  if (targets.scalar_type() != ScalarType::Long || !targets.is_contiguous()) refuse("targets: must be contiguous int64");
  if (gathered.dim() != 3 || gathered.size(1) != rows ||
      (gathered.size(2) != kPartialWidth && gathered.size(2) != kPartialWidthWithMoments))
    refuse("gathered: must be [shards, ", rows, ", ", kPartialWidth, " or ", kPartialWidthWithMoments, "]");
  check_floats("gathered", gathered, gathered.numel());
  return gathered.size(2) == kPartialWidthWithMoments;
}

inline const int64_t* ids(const Tensor& targets) { return static_cast<const int64_t*>(targets.const_data_ptr()); }

inline const float* floats(const char* name, const Tensor& tensor, int64_t count) {
  check_floats(name, tensor, count);
  return static_cast<const float*>(tensor.const_data_ptr());
}

inline float* mutable_floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// Null for no tensor.
template <class T>
inline const T* optional_pointer(const char* name, const std::optional<Tensor>& tensor, ScalarType type, int64_t tokens) {
  if (!tensor) return nullptr;
  if (tensor->scalar_type() != type || !tensor->is_contiguous() || tensor->numel() != tokens)
    refuse(name, ": must be contiguous ", type == ScalarType::Bool ? "bool" : "float32", " with ", tokens, " elements");
  return static_cast<const T*>(tensor->const_data_ptr());
}

// An uninitialised contiguous tensor on the device of `like`, straight from the allocator: torch::stable::new_empty
// goes through the dispatcher, boxed, which would take most of the time of a small call.
inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape, int32_t type) {
  int64_t strides[4], stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= shape.begin()[i]) strides[i] = stride;
  int32_t device_type, device_index;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.begin(), strides, type, device_type,
                                                         device_index, &handle));
  return Tensor(handle);
}

inline Tensor new_logits(const Tensor& like) {
  int32_t type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &type));
  return new_tensor(like, {like.size(0), like.size(1)}, type);
}

inline Tensor new_floats(const Tensor& like, std::initializer_list<int64_t> shape) {
  return new_tensor(like, shape, aoti_torch_dtype_float32());
}

}  // namespace megatron_rlvr
