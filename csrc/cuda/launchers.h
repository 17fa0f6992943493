// What the CUDA kernels offer to a binding: plain C functions over raw pointers and a stream, no torch.
//
// Contract of every launcher
// - pointers are device memory, contiguous and fp32 unless said otherwise; nothing is checked here but the launch;
// - work is queued on `stream` (a cudaStream_t); no allocation, no synchronisation with the host, so that a launch may
//   be captured in a CUDA graph (scalars such as the clip thresholds are then part of the graph);
// - the return value is the cudaError_t of the launch, 0 for success; zero rows are a success without a launch.
#pragma once
#include <cstdint>

#include "../formulas.h"

namespace megatron_rlvr {

enum LogitsType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Columns of a row of partial statistics: RowSums and the target's raw logit, which is -inf where the target is not in
// the shard or is ignored; shards merge as RowSums do, and by the maximum of the target's logit.
enum PartialColumn : int {
  kMaximum = 0,
  kExcess = 1,
  kExponentialX = 2,
  kTargetLogit = 3,
  kSquaredExcess = 4,
  kSquaredX = 5,
};
constexpr int64_t kPartialWidth = 4;             // without second moments
constexpr int64_t kPartialWidthWithMoments = 6;

// Columns of the row state, all that the gradient needs besides the logits: raw maximum, ln sum e^x, entropy, log-prob.
constexpr int64_t kStateWidth = 4;

// Report of rows that cannot be normalised or whose target does not exist: int32[2] in device memory, which the caller
// fills with kNoBadRow; after combine_statistics, [0] is the first row with NaN, +inf or only -inf logits, [1] the
// first with a target outside the vocabulary that is not kIgnoredTarget. It is the same on every tensor-parallel rank.
constexpr int32_t kNoBadRow = INT32_MAX;

struct RowStatisticsArguments {
  const void* logits;          // [rows, vocabulary], `row_stride` elements apart; aligned to its element only
  int32_t logits_type;         // LogitsType
  int64_t rows;
  int64_t vocabulary;          // width of this shard
  int64_t row_stride;
  const int64_t* targets;      // [rows] global ids
  int64_t vocabulary_start;    // global id of this shard's first column
  double inverse_temperature;  // rounded to fp32 where it meets logits, not where a row is finished
  bool second_moments;
  float* partials;             // [rows, kPartialWidth or kPartialWidthWithMoments]
  float* workspace;            // row_statistics_workspace(...) floats, may be null when that is 0
  void* stream;
};

struct CombineStatisticsArguments {
  const float* partials;       // [shards, rows, width]
  int64_t shards;
  int64_t rows;
  bool second_moments;
  const int64_t* targets;      // [rows] global ids
  int64_t vocabulary;          // of all shards together
  double inverse_temperature;  // rounded to fp32 where it meets logits, not where a row is finished
  float* logprob;              // [rows]; 0 for ignored targets, NaN for rows that cannot be normalised
  float* entropy;              // [rows]; NaN likewise
  float* state;                // [rows, kStateWidth], 16-byte aligned
  float* moments;              // [2, rows] sum p^2 and sum p^2 ln p; null without second moments
  int32_t* bad_rows;           // [2], see kNoBadRow, or null for no report
  void* stream;
};

struct LogitsGradientArguments {
  const void* logits;          // as for the statistics
  void* gradient;              // [rows, vocabulary] of the logits' type: `logits` itself, or not overlapping it
  int32_t logits_type;
  int64_t rows;
  int64_t vocabulary;
  int64_t row_stride;          // of the logits
  int64_t gradient_row_stride;
  const int64_t* targets;
  int64_t vocabulary_start;
  double inverse_temperature;  // rounded to fp32 where it meets logits, not where a row is finished
  const float* state;          // [rows, kStateWidth] of combine_statistics, 16-byte aligned
  const float* gradient_logprob;   // [rows] or null for 0
  const float* gradient_entropy;   // [rows] or null for 0; a row with both 0 gets zeros and its logits are not read
  void* stream;
};

// Counts that clipped_objective adds to, int64[6] in device memory, which the caller fills with zeros.
enum ObjectiveCount : int { kCountClippedHigh = 0, kCountClippedLow = 1, kCountRegion1 = 2, kObjectiveCounts = 6 };

struct ClippedObjectiveArguments {
  const float* logprob;        // [tokens]
  const float* old_logprob;    // [tokens]
  const float* advantage;      // [tokens]
  const bool* mask;            // [tokens] or null for all; a masked-out token gives 0, whatever its other numbers are
  const float* weight;         // [tokens] or null for 1; multiplies objective and gradient
  const float* entropy;        // [tokens] or null: no region counts
  int64_t tokens;
  ClipScalars clip;
  float* objective;            // [tokens]
  float* gradient;             // [tokens] d objective / d logprob
  int64_t* counts;             // [kObjectiveCounts]: clipped high, clipped low, E1, E2, E3, E4
  void* stream;
};

}  // namespace megatron_rlvr

extern "C" {
// Floats of workspace that the statistics of this shape need: not 0 where rows are few and long, so that each is split.
// `multiprocessors` of the device that will run it.
int64_t megatron_rlvr_row_statistics_workspace(int64_t rows, int64_t vocabulary, bool second_moments,
                                               int multiprocessors);
// `multiprocessors` must be what the workspace was asked for with.
int megatron_rlvr_row_statistics(const megatron_rlvr::RowStatisticsArguments* arguments, int multiprocessors);
int megatron_rlvr_combine_statistics(const megatron_rlvr::CombineStatisticsArguments* arguments);
int megatron_rlvr_logits_gradient(const megatron_rlvr::LogitsGradientArguments* arguments, int multiprocessors);
int megatron_rlvr_clipped_objective(const megatron_rlvr::ClippedObjectiveArguments* arguments, int multiprocessors);
}
