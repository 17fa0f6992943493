// The kept sets of rows: the ids to which a row's softmax is restricted, as after a top-p or top-k cut. All other ids of
// the row have probability 0 and gradient 0, whatever their logits are. For the CPU and the CUDA kernels.
#pragma once
#include "formulas.h"
#include "kernel_arguments.h"

namespace megatron_rlvr {

struct KeptRange {
  int64_t begin;
  int64_t end;
};

// The first position in [begin, end) whose id is at least `id`, among ascending ids. `load(address)` reads memory.
template <class Load>
MEGATRON_RLVR_FORMULA int64_t first_at_least(const int32_t* ids, int64_t begin, int64_t end, int64_t id, const Load& load) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (load(ids + middle) < id) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// Positions of the ids of a row within [first, last). Offsets that point outside the ids are cut.
template <class Load>
MEGATRON_RLVR_FORMULA KeptRange kept_between(const KeptSets& kept, int64_t row, int64_t first, int64_t last,
                                             const Load& load) {
  int64_t begin = load(kept.offsets + row), end = load(kept.offsets + row + 1);
  if (begin < 0) begin = 0;
  if (end > kept.count) end = kept.count;
  KeptRange range;
  range.begin = first_at_least(kept.ids, begin, end, first, load);
  range.end = first_at_least(kept.ids, range.begin, end, last, load);
  return range;
}

template <class Load>
MEGATRON_RLVR_FORMULA bool contains(const KeptSets& kept, const KeptRange& range, int64_t id, const Load& load) {
  const int64_t position = first_at_least(kept.ids, range.begin, range.end, id, load);
  return position < range.end && load(kept.ids + position) == id;
}

// The column of an id in a shard, or -1 if it is outside. The ranges above hold no such id if the ids ascend; this keeps
// a kernel inside its tensors if they do not.
MEGATRON_RLVR_FORMULA int64_t column_of(int32_t id, int64_t vocabulary_start, int64_t vocabulary) {
  const int64_t column = int64_t(id) - vocabulary_start;
  return column >= 0 && column < vocabulary ? column : -1;
}

}  // namespace megatron_rlvr
