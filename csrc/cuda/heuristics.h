// The number of threads and blocks for a shape. Host code without CUDA, which tests call directly.
#pragma once
#include <algorithm>
#include <cstdint>

namespace megatron_rlvr {

constexpr int kMaximumThreads = 512;
constexpr int kLogitsPerTile = 16;       // logits that a thread loads before it uses them: 32 or 64 bytes
constexpr int kBytesPerThread = 512;     // least bytes of an uncut row that a thread reads, where the width allows
constexpr int64_t kSliceQuantum = 4096;  // slices are multiples of this, so that each is aligned like its row

// Each row is cut into `slices` slices of `slice_width` logits, with one block of `threads` threads per slice.
struct RowLaunch {
  int threads;
  int64_t slices;
  int64_t slice_width;
};

// A power of two of threads, each with at least `logits_per_thread` where the width allows.
inline int threads_for(int64_t width, int logits_per_thread) {
  int threads = 32;
  while (threads < kMaximumThreads && int64_t(threads) * logits_per_thread < width) threads *= 2;
  return threads;
}

// Cuts rows into at least `blocks` slices in total, unless slices would become shorter than kSliceQuantum.
inline RowLaunch cut_rows(int64_t rows, int64_t width, int64_t blocks, int64_t minimum_width) {
  const int64_t wanted = std::max<int64_t>(1, (blocks + rows - 1) / rows);
  const int64_t quanta = std::max<int64_t>(1, ((width + wanted - 1) / wanted + kSliceQuantum - 1) / kSliceQuantum);
  RowLaunch launch;
  launch.slice_width = std::max(quanta * kSliceQuantum, minimum_width);
  launch.slices = std::max<int64_t>(1, (width + launch.slice_width - 1) / launch.slice_width);
  launch.threads = threads_for(std::min(width, launch.slice_width), 2 * kLogitsPerTile);
  return launch;
}

// Statistics: one block per row where there are enough rows to fill the device twice. Such a block has few threads,
// since other rows keep the multiprocessor busy while one is reduced. (Measured on an H200, bf16 [4096, 18992]: 72 us
// with two tiles per thread, 59 us with sixteen.) Fewer rows are cut into slices, which a second, small kernel
// merges. Slices have at least 16384 logits: below that the second kernel costs more than it gains.
inline RowLaunch statistics_launch(int64_t rows, int64_t width, int multiprocessors, int logit_bytes) {
  const int64_t fill = 2 * int64_t(multiprocessors);
  if (rows >= fill) return {threads_for(width, kBytesPerThread / logit_bytes), 1, std::max<int64_t>(width, 1)};
  return cut_rows(rows, width, fill, 4 * kSliceQuantum);
}

// Gradient: there is nothing to reduce, so rows are always cut into slices of about 32768 logits (4 tiles per
// thread). With few long blocks instead, the device would idle while the last ones finish.
inline RowLaunch gradient_launch(int64_t rows, int64_t width, int multiprocessors) {
  const int64_t fill = std::max<int64_t>(4 * int64_t(multiprocessors), rows * ((width + 32767) / 32768));
  return cut_rows(rows, width, fill, kSliceQuantum);
}

// Kept sets: most hold a few ids, so a block has few threads.
constexpr int kKeptThreads = 64;
constexpr int kKeptIdsPerTile = 4;      // kept logits that a thread loads before it uses them
constexpr int kKeptSliceBits = 15;      // the gradient of a row is cut into slices of at most 2^15 logits
constexpr int kKeptGradientThreads = 256;

}  // namespace megatron_rlvr
