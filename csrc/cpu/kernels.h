// The CPU kernels as the binding sees them: one table of functions for each instruction set, chosen at run time.
//
// Every function works on the rows (or tokens) [begin, end), so that the caller can hand stretches to its threads.
// Pointers are host memory, contiguous unless a stride is given; nothing is checked, allocated or thrown here.
#pragma once
#include <cstdint>

namespace megatron_rlvr::cpu {

enum LogitsType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Columns of a row's partials and state are those of ../cuda/launchers.h and of the eager reference.
struct RowStatisticsArguments {
  const void* logits;           // [rows, vocabulary], `row_stride` elements apart
  LogitsType logits_type;
  int64_t vocabulary;           // width of this shard
  int64_t row_stride;
  const int64_t* targets;       // [rows] global ids, negative where there is none
  int64_t vocabulary_start;     // global id of this shard's first column
  float inverse_temperature;
  bool second_moments;
  float* partials;              // [rows, 4 or 6]
};

struct LogitsGradientArguments {
  const void* logits;
  void* gradient;               // [rows, vocabulary] of the logits' type; may be `logits` itself
  LogitsType logits_type;
  int64_t vocabulary;
  int64_t row_stride;
  int64_t gradient_row_stride;
  const int64_t* targets;
  int64_t vocabulary_start;
  float inverse_temperature;
  const float* state;           // [rows, 4]
  const float* gradient_logprob;   // [rows]
  const float* gradient_entropy;   // [rows]; a row with both 0 gets zeros and its logits are not read
};

struct Kernels {
  const char* name;  // what ops.backend() reports
  void (*row_statistics)(const RowStatisticsArguments&, int64_t begin, int64_t end);
  void (*logits_gradient)(const LogitsGradientArguments&, int64_t begin, int64_t end);
};

extern const Kernels kAvx512Kernels, kAvx2Kernels, kBaselineKernels;

// The widest kernels that this processor runs. MEGATRON_RLVR_CPU=avx512|avx2|baseline in the environment asks for less.
const Kernels& kernels();

}  // namespace megatron_rlvr::cpu
