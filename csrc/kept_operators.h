// The operators of torch.ops.megatron_rlvr under kept sets, for any backend: those of operators.h with two more tensors.
#pragma once
#include <algorithm>

#include "operators.h"

namespace megatron_rlvr {

inline KeptSets kept_sets(const Tensor& kept_ids, const Tensor& kept_offsets, int64_t rows) {
  if (kept_ids.scalar_type() != ScalarType::Int || kept_ids.dim() != 1 || !kept_ids.is_contiguous())
    refuse("kept: ids must be contiguous int32 [K]");
  if (kept_offsets.scalar_type() != ScalarType::Long || kept_offsets.dim() != 1 ||
      kept_offsets.size(0) != rows + 1 || !kept_offsets.is_contiguous())
    refuse("kept: offsets must be contiguous int64 [", rows + 1, "]");
  return {static_cast<const int32_t*>(kept_ids.const_data_ptr()), kept_ids.numel(), ids(kept_offsets)};
}

// Reads the sets, which must be in host memory. Refuses a set that is empty, does not ascend, leaves the vocabulary or
// lacks its row's target.
inline void check_kept_values(const KeptSets& kept, const int64_t* targets, int64_t rows, int64_t vocabulary) {
  for (int64_t row = 0; row < rows; row++) {
    const int64_t begin = kept.offsets[row], end = kept.offsets[row + 1], target = targets[row];
    if (begin < 0 || end <= begin || end > kept.count)
      refuse("kept: offsets must rise by at least 1 per row, from 0 to at most ", kept.count, ", found ", begin, " and ",
             end, " in row ", row);
    const int32_t* ids = kept.ids + begin;
    bool ascends = true;
    for (int64_t i = 1; i < end - begin; i++) ascends &= ids[i - 1] < ids[i];
    if (!ascends) refuse("kept: the ids of a row must ascend strictly, those of row ", row, " do not; KeptSets.of sorts them");
    if (ids[0] < 0 || ids[end - begin - 1] >= vocabulary)
      refuse("kept: ids must be in [0, ", vocabulary, "), found ", ids[0], " to ", ids[end - begin - 1], " in row ", row);
    if (target >= 0 && !std::binary_search(ids, ids + (end - begin), int32_t(target)))
      refuse("kept: the target of row ", row, ", ", target, ", is not in its kept set: it cannot have been drawn from it");
  }
}

template <class Backend>
Tensor kept_row_statistics(const Tensor logits, const Tensor targets, const Tensor kept_ids, const Tensor kept_offsets,
                           int64_t vocab_start, int64_t vocab_size, double inverse_temperature, bool second_moments) {
  check_logits(logits, targets);
  const Backend backend(logits);
  backend.check_targets(ids(targets), logits.size(0), vocab_size);
  Tensor partials = new_floats(logits, {logits.size(0), second_moments ? kPartialWidthWithMoments : kPartialWidth});
  KeptRowStatisticsArguments a;
  a.row = row_arguments(logits, targets, vocab_start, inverse_temperature, second_moments, partials);
  a.kept = kept_sets(kept_ids, kept_offsets, logits.size(0));
  backend.check_kept(a.kept, ids(targets), logits.size(0), vocab_size);
  a.row.stream = backend.stream;
  backend.launch(a);
  return partials;
}

template <class Backend>
void write_kept_gradient(const Tensor& logits, const Tensor& gradient, const Tensor& targets, const Tensor& kept_ids,
                         const Tensor& kept_offsets, const Tensor& state, const Tensor& grad_logprob,
                         const Tensor& grad_entropy, int64_t vocab_start, double inverse_temperature) {
  check_logits(logits, targets);
  const Backend backend(logits);
  KeptLogitsGradientArguments a;
  a.row = gradient_arguments(logits, gradient, targets, state, grad_logprob, grad_entropy, vocab_start,
                             inverse_temperature);
  a.kept = kept_sets(kept_ids, kept_offsets, logits.size(0));
  a.row.stream = backend.stream;
  backend.launch(a);
}

template <class Backend>
Tensor kept_logits_gradient(const Tensor logits, const Tensor targets, const Tensor kept_ids, const Tensor kept_offsets,
                            const Tensor state, const Tensor grad_logprob, const Tensor grad_entropy,
                            int64_t vocab_start, double inverse_temperature) {
  Tensor gradient = new_logits(logits);
  write_kept_gradient<Backend>(logits, gradient, targets, kept_ids, kept_offsets, state, grad_logprob, grad_entropy,
                               vocab_start, inverse_temperature);
  return gradient;
}

template <class Backend>
void kept_logits_gradient_(Tensor logits, const Tensor targets, const Tensor kept_ids, const Tensor kept_offsets,
                           const Tensor state, const Tensor grad_logprob, const Tensor grad_entropy, int64_t vocab_start,
                           double inverse_temperature) {
  check_in_place(logits);
  write_kept_gradient<Backend>(logits, logits, targets, kept_ids, kept_offsets, state, grad_logprob, grad_entropy,
                               vocab_start, inverse_temperature);
}

template <class Backend, class Library>
void register_kept_operators(Library& library) {
  library.impl("kept_row_statistics", TORCH_BOX(&kept_row_statistics<Backend>));
  library.impl("kept_logits_gradient", TORCH_BOX(&kept_logits_gradient<Backend>));
  library.impl("kept_logits_gradient_", TORCH_BOX(&kept_logits_gradient_<Backend>));
}

}  // namespace megatron_rlvr
