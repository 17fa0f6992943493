// Registers the operators for CPU tensors. Built on torch's stable ABI, so one library serves several torch versions.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "kept_operators.h"

namespace megatron_rlvr {
namespace {

// For fewer logits than this, waking a thread costs more than it gains.
constexpr int64_t kLogitsPerThread = 32768;
// Cost of a row of combine_statistics and of a token of clipped_objective, in logits: a few logarithms or exponentials.
constexpr int64_t kCombineCost = 64, kTokenCost = 16;
// Zeros that are written in the time of one logit of a gradient.
constexpr int64_t kZeroCost = 8;

// Runs `kernel` over all rows, in ranges on torch's threads.
template <class Arguments>
void run_parallel(void (*kernel)(const Arguments&, int64_t, int64_t), const Arguments& a, int64_t rows, int64_t row_cost) {
  if (rows == 0) return;
  const int64_t grain = std::max<int64_t>(1, kLogitsPerThread / std::max<int64_t>(1, row_cost));
  if (rows <= grain)
    kernel(a, 0, rows);
  else
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

struct CpuBackend {
  static constexpr void* stream = nullptr;

  explicit CpuBackend(const Tensor&) {}

  void check_targets(const int64_t* targets, int64_t rows, int64_t vocabulary) const {
    for (int64_t row = 0; row < rows; row++)
      if (targets[row] != kIgnoredTarget && (targets[row] < 0 || targets[row] >= vocabulary))
        refuse("targets: must be ids in [0, ", vocabulary, ") or ", kIgnoredTarget, " for a row without target, found ",
               targets[row], " in row ", row);
  }

  void check_kept(const KeptSets& kept, const int64_t* targets, int64_t rows, int64_t vocabulary) const {
    check_kept_values(kept, targets, rows, vocabulary);
  }

  int64_t workspace_floats(int64_t, int64_t, bool) const { return 0; }

  Tensor zeroed_counts(const Tensor& like) const {
    Tensor counts = new_tensor(like, {kObjectiveCounts}, aoti_torch_dtype_int64());
    std::memset(counts.mutable_data_ptr(), 0, kObjectiveCounts * sizeof(int64_t));
    return counts;
  }

  void launch(const RowStatisticsArguments& a) const {
    run_parallel(cpu::row_kernels().row_statistics, a, a.rows, a.vocabulary);
  }
  void launch(const CombineStatisticsArguments& a) const {
    run_parallel(cpu::combine_statistics, a, a.rows, kCombineCost);
  }
  void launch(const LogitsGradientArguments& a) const {
    run_parallel(cpu::row_kernels().logits_gradient, a, a.rows, a.vocabulary);
  }
  void launch(const KeptRowStatisticsArguments& a) const {
    run_parallel(cpu::row_kernels().kept_row_statistics, a, a.row.rows, mean_kept(a));
  }
  void launch(const KeptLogitsGradientArguments& a) const {
    // A zero costs a small part of a logit.
    run_parallel(cpu::row_kernels().kept_logits_gradient, a, a.row.rows, mean_kept(a) + a.row.vocabulary / kZeroCost);
  }
  void launch(const ClippedObjectiveArguments& a) const {
    run_parallel(cpu::clipped_objective, a, a.tokens, kTokenCost);
  }

  template <class Arguments>
  static int64_t mean_kept(const Arguments& a) {
    return a.row.rows ? a.kept.count / a.row.rows + 1 : 0;
  }

  // Checks every call: the results are in host memory already.
  class RowReport {
   public:
    RowReport(const CpuBackend&, const Tensor&) {}

    int32_t* bad_rows() { return bad_rows_; }

    void check(const CombineStatisticsArguments& a) const {
      if (bad_rows_[1] != kNoBadRow)
        refuse("targets: neither an id of the vocabulary nor ", kIgnoredTarget, " in row ", bad_rows_[1]);
      if (bad_rows_[0] == kNoBadRow) return;
      std::vector<int64_t> rows;
      for (int64_t row = bad_rows_[0]; row < a.rows; row++)
        if (!std::isfinite(a.state[kStateWidth * row + kStateLogSum])) rows.push_back(row);
      std::string names;
      for (size_t i = 0; i < rows.size() && i < 8; i++) names += (i ? ", " : "") + std::to_string(rows[i]);
      refuse("logits: ", rows.size(), " of ", a.rows, " rows hold NaN or +inf, or nothing above -inf: rows ", names,
             rows.size() > 8 ? ", ..." : "");
    }

   private:
    int32_t bad_rows_[2] = {kNoBadRow, kNoBadRow};
  };
};

}  // namespace
}  // namespace megatron_rlvr

STABLE_TORCH_LIBRARY_IMPL(megatron_rlvr, CPU, m) {
  megatron_rlvr::register_operators<megatron_rlvr::CpuBackend>(m);
  megatron_rlvr::register_kept_operators<megatron_rlvr::CpuBackend>(m);
}
