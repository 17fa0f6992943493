#include "row_statistics.cuh"

#include "combine_statistics.cuh"

using namespace megatron_rlvr;

extern "C" int64_t megatron_rlvr_row_statistics_workspace(int64_t rows, int64_t vocabulary, bool second_moments,
                                                          int multiprocessors) {
  if (rows == 0) return 0;
  const RowLaunch launch = statistics_launch(rows, vocabulary, multiprocessors, 4);  // every type has the same slices
  return launch.slices == 1 ? 0 : rows * launch.slices * partial_width(second_moments);
}

extern "C" int megatron_rlvr_row_statistics(const RowStatisticsArguments* arguments, int multiprocessors) {
  const RowStatisticsArguments& a = *arguments;
  if (a.rows == 0) return 0;
  const int logit_bytes = a.logits_type == kFloat32 ? 4 : 2;
  const RowLaunch launch = statistics_launch(a.rows, a.vocabulary, multiprocessors, logit_bytes);
  switch (a.logits_type) {
    case kFloat32: launch_row_statistics<float>(a, launch); break;
    case kBFloat16: launch_row_statistics<__nv_bfloat16>(a, launch); break;
    case kFloat16: launch_row_statistics<__half>(a, launch); break;
    default: return int(cudaErrorInvalidValue);
  }
  if (launch.slices > 1) launch_merge_slices(a, launch.slices);
  return launch_status();
}

extern "C" int megatron_rlvr_combine_statistics(const CombineStatisticsArguments* arguments) {
  if (arguments->rows == 0) return 0;
  launch_combine_statistics(*arguments);
  return launch_status();
}
