// Arguments of the kernels, shared by the CPU and the CUDA backend. Raw pointers and sizes, no torch.
//
// Pointers are memory of the device that the backend serves, contiguous and float32 unless a comment says otherwise.
// Kernels check nothing and allocate nothing: the bindings have checked the tensors, and have allocated the outputs.
#pragma once
#include <cstdint>

namespace megatron_rlvr {

enum LogitsType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A row with this target (padding, prompt) has log-prob 0 and no gradient through it. Its entropy is still exact.
constexpr int64_t kIgnoredTarget = -100;

// Columns of a row of partial statistics: the RowSums of formulas.h and the target's raw logit, which is -inf where the
// target is ignored or lies in another shard. Shards merge as RowSums do, and by the maximum of the target's logit.
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

// Columns of the row state: all that the gradient needs besides the logits.
enum StateColumn : int { kStateMaximum = 0, kStateLogSum = 1, kStateEntropy = 2, kStateLogprob = 3 };
constexpr int64_t kStateWidth = 4;

// Value of both numbers of a row report in which combine_statistics found nothing to report.
constexpr int32_t kNoBadRow = INT32_MAX;

struct RowStatisticsArguments {
  const void* logits;          // [rows, vocabulary], rows `row_stride` elements apart; aligned to an element only
  int32_t logits_type;         // a LogitsType
  int64_t rows;
  int64_t vocabulary;          // width of this shard
  int64_t row_stride;
  const int64_t* targets;      // [rows] ids of the whole vocabulary
  int64_t vocabulary_start;    // id of this shard's first column
  double inverse_temperature;  // rounded to float32 where it multiplies logits, and nowhere else
  bool second_moments;
  float* partials;             // [rows, kPartialWidth or kPartialWidthWithMoments]
  float* workspace;            // CUDA: megatron_rlvr_row_statistics_workspace(...) floats; may be null when that is 0
  void* stream;                // CUDA: a cudaStream_t
};

struct CombineStatisticsArguments {
  const float* partials;       // [shards, rows, width]
  int64_t shards;
  int64_t rows;
  bool second_moments;
  const int64_t* targets;      // [rows] ids of the whole vocabulary
  int64_t vocabulary;          // width of all shards together
  double inverse_temperature;
  float* logprob;              // [rows]; 0 for an ignored target, NaN for a row that cannot be normalised
  float* entropy;              // [rows]; NaN for a row that cannot be normalised
  float* state;                // [rows, kStateWidth]; 16-byte aligned on CUDA
  float* moments;              // [2, rows] sum p^2 and sum p^2 ln p; null without second moments
  // Row report, [2], or null for none. The caller fills it with kNoBadRow. Afterwards [0] is the first row that
  // cannot be normalised and [1] the first row whose target is neither an id of the vocabulary nor kIgnoredTarget. It
  // is the same on every tensor-parallel rank.
  int32_t* bad_rows;
  void* stream;                // CUDA: a cudaStream_t
};

struct LogitsGradientArguments {
  const void* logits;              // as for row_statistics
  void* gradient;                  // [rows, vocabulary] of the logits' type: `logits` itself, or no overlap with it
  int32_t logits_type;             // a LogitsType
  int64_t rows;
  int64_t vocabulary;
  int64_t row_stride;              // of the logits
  int64_t gradient_row_stride;
  const int64_t* targets;
  int64_t vocabulary_start;
  double inverse_temperature;
  const float* state;              // [rows, kStateWidth] from combine_statistics; 16-byte aligned on CUDA
  const float* gradient_logprob;   // [rows], or null for 0
  const float* gradient_entropy;   // [rows], or null for 0. Where both are 0 the row gets zeros and is not read.
  void* stream;                    // CUDA: a cudaStream_t
};

// The ids to which each row's softmax is restricted: of row r, the ids [offsets[r], offsets[r + 1]) of `ids`. They ascend
// strictly. The target of a row must be among them: otherwise every result of the row is NaN.
struct KeptSets {
  const int32_t* ids;      // [count], of the whole vocabulary
  int64_t count;
  const int64_t* offsets;  // [rows + 1]
};

// The operators under kept sets read the kept logits alone. Every logit gets its gradient, which is 0 outside the set.
struct KeptRowStatisticsArguments {
  RowStatisticsArguments row;  // the workspace is not used
  KeptSets kept;
};

struct KeptLogitsGradientArguments {
  LogitsGradientArguments row;
  KeptSets kept;
};

// The four scalars of a step: thresholds intercept + slope p on the lower and the upper side of ratio 1. The caller has
// checked that the bounds they imply exist for every p in [0, 1]: lower slope above -1, upper slope below 1.
struct ClipScalars {
  float lower_intercept;
  float lower_slope;
  float upper_intercept;
  float upper_slope;
};

// Counts of clipped_objective, int64[kObjectiveCounts]. The kernel adds to them: the caller fills them with zeros.
enum ObjectiveCount : int { kCountClippedHigh = 0, kCountClippedLow = 1, kCountRegion1 = 2, kObjectiveCounts = 6 };

struct ClippedObjectiveArguments {
  const float* logprob;        // [tokens]
  const float* old_logprob;    // [tokens]
  const float* advantage;      // [tokens]
  const bool* mask;            // [tokens], or null for all. A masked token gives 0, whatever its other numbers are.
  const float* weight;         // [tokens], or null for 1; multiplies objective and gradient
  const float* entropy;        // [tokens], or null for no region counts
  int64_t tokens;
  ClipScalars clip;            // bounds as functions of the old probability; not read where `low` and `high` are given
  const float* low;            // [tokens] bounds of the ratio, or null for those of `clip`
  const float* high;           // [tokens], null where `low` is
  float dual_clip;             // bound of the ratio from above where A < 0; infinity for none
  float* objective;            // [tokens]
  float* gradient;             // [tokens] d objective / d logprob
  uint8_t* gate;               // [tokens] a Gate of formulas.h, or null for no output
  int64_t* counts;             // [kObjectiveCounts]: clipped high, clipped low, E1, E2, E3, E4
  void* stream;                // CUDA: a cudaStream_t
};

}  // namespace megatron_rlvr
