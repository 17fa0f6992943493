// The kernels under kept sets, written in terms of `Vector` and of the functions in row_kernels.h: the kept logits of a row
// are gathered into a block that stays in the first-level cache.
#pragma once
#include "row_kernels.h"

namespace megatron_rlvr::cpu {
namespace {
namespace isolated {
#include "../kept_sets.h"
}

struct Load {
  template <class T>
  T operator()(const T* address) const {
    return *address;
  }
};

template <class Arguments>
formulas::KeptRange kept_of_shard(const Arguments& a, const KeptSets& kept, int64_t row) {
  return formulas::kept_between(kept, row, a.vocabulary_start, a.vocabulary_start + a.vocabulary, Load());
}

// The logits of `ids`, and -inf after them up to a whole vector. `block` has room for kBlock floats.
template <class Arguments, class T>
void gather(const Arguments& a, const T* p, const int32_t* ids, int64_t count, float* block) {
  for (int64_t i = 0; i < count; i++) {
    const int64_t column = formulas::column_of(ids[i], a.vocabulary_start, a.vocabulary);
    block[i] = column >= 0 ? to_float(p[column]) : -INFINITY;
  }
  for (int64_t i = count; i % Vector::kLanes; i++) block[i] = -INFINITY;
}

// The first column of `count` ids that are consecutive, as in a set that holds most of the vocabulary; else -1. Their
// logits need not be gathered.
template <class Arguments>
int64_t consecutive_from(const Arguments& a, const int32_t* ids, int64_t count) {
  const int64_t first = formulas::column_of(ids[0], a.vocabulary_start, a.vocabulary);
  const int64_t last = formulas::column_of(ids[count - 1], a.vocabulary_start, a.vocabulary);
  return first >= 0 && last - first == count - 1 ? first : -1;
}

inline int64_t block_count(const formulas::KeptRange& range, int64_t start) {
  return range.end - start < kBlock ? range.end - start : kBlock;
}

template <bool kMoments, class T>
void kept_row_statistics_of(const KeptRowStatisticsArguments& arguments, int64_t begin, int64_t end) {
  constexpr int64_t width = kMoments ? kPartialWidthWithMoments : kPartialWidth;
  const RowStatisticsArguments& a = arguments.row;
  const KeptSets& kept = arguments.kept;
  float block[kBlock];
  for (int64_t row = begin; row < end; row++) {
    const T* p = static_cast<const T*>(a.logits) + row * a.row_stride;
    const formulas::KeptRange range = kept_of_shard(a, kept, row);
    formulas::RowSums<double> sums;
    for (int64_t start = range.begin; start < range.end; start += kBlock) {
      const int64_t count = block_count(range, start), first = consecutive_from(a, kept.ids + start, count);
      if (first >= 0) {
        add_logits<kMoments>(p + first, count, float(a.inverse_temperature), sums);
        continue;
      }
      gather(a, p, kept.ids + start, count, block);
      add_logits<kMoments>(block, count, float(a.inverse_temperature), sums);
    }
    const int64_t column = target_column(a, row);
    if (column >= 0 && !formulas::contains(kept, range, a.targets[row], Load())) sums.maximum = NAN;
    store_partial<kMoments>(a.partials + row * width, sums, column >= 0 ? to_float(p[column]) : -INFINITY);
  }
}

// In place, a block's logits must be read before the zeros around its ids are written: the ids ascend, so that these
// zeros lie before the logits of the next block.
template <class T>
void kept_logits_gradient_of(const KeptLogitsGradientArguments& arguments, int64_t begin, int64_t end) {
  const LogitsGradientArguments& a = arguments.row;
  const KeptSets& kept = arguments.kept;
  float block[kBlock];
  with_row_gradients<T>(a, begin, end, [&](int64_t row, const RowGradient& gradient, const T* p, T* out) {
    const int64_t target = target_column(a, row);
    const formulas::KeptRange range = kept_of_shard(a, kept, row);
    int64_t written = 0;  // the columns before this one have their gradient
    for (int64_t start = range.begin; start < range.end; start += kBlock) {
      const int64_t count = block_count(range, start);
      const int32_t* ids = kept.ids + start;
      const int64_t first = consecutive_from(a, ids, count);
      if (first >= written) {
        memset(out + written, 0, size_t(first - written) * sizeof(T));
        write_gradients(gradient, p + first, out + first, count);
        if (target >= first && target < first + count) assign(out[target], gradient.at_target);
        written = first + count;
        continue;
      }
      gather(a, p, ids, count, block);
      for (int64_t i = 0; i < count; i += Vector::kLanes)
        Vector::store(block + i, gradient.at(Vector::load(block + i)));
      const int64_t next = formulas::column_of(ids[count - 1], a.vocabulary_start, a.vocabulary) + 1;
      if (next > written) {
        memset(out + written, 0, size_t(next - written) * sizeof(T));
        written = next;
      }
      for (int64_t i = 0; i < count; i++) {
        const int64_t column = formulas::column_of(ids[i], a.vocabulary_start, a.vocabulary);
        if (column >= 0) assign(out[column], column == target ? gradient.at_target : block[i]);
      }
    }
    memset(out + written, 0, size_t(a.vocabulary - written) * sizeof(T));
  });
}

void kept_row_statistics(const KeptRowStatisticsArguments& a, int64_t begin, int64_t end) {
  with_logits_type(a.row.logits_type, [&](auto zero) {
    using T = decltype(zero);
    if (a.row.second_moments)
      kept_row_statistics_of<true, T>(a, begin, end);
    else
      kept_row_statistics_of<false, T>(a, begin, end);
  });
}

void kept_logits_gradient(const KeptLogitsGradientArguments& a, int64_t begin, int64_t end) {
  with_logits_type(a.row.logits_type, [&](auto zero) { kept_logits_gradient_of<decltype(zero)>(a, begin, end); });
}

}  // namespace
}  // namespace megatron_rlvr::cpu
