// How many threads and blocks a shape gets. Host code, no CUDA: tests call it directly.
#pragma once
#include <algorithm>
#include <cstdint>

namespace megatron_rlvr {

constexpr int kMaximumThreads = 512;
constexpr int kLogitsPerTile = 16;       // a thread's logits in flight: 32 or 64 bytes, in one or more vectors
constexpr int kBytesOfAWholeRow = 512;   // what a thread has of one at least, where the width allows
constexpr int64_t kSliceQuantum = 4096;  // slices of a row are multiples of this, so that all are aligned as the row is

// Each row is cut into `slices` pieces of `slice_width` logits, one block of `threads` each.
struct RowLaunch {
  int threads;
  int64_t slices;
  int64_t slice_width;
};

// A power of two of threads, each with at least `logits_a_thread` where the width allows.
inline int threads_for(int64_t width, int logits_a_thread) {
  int threads = 32;
  while (threads < kMaximumThreads && int64_t(threads) * logits_a_thread < width) threads *= 2;
  return threads;
}

// Cuts rows so that `blocks` of them are there, if that leaves slices of at least kSliceQuantum.
inline RowLaunch cut_rows(int64_t rows, int64_t width, int64_t blocks, int64_t minimum_width) {
  const int64_t wanted = std::max<int64_t>(1, (blocks + rows - 1) / rows);
  const int64_t quanta = std::max<int64_t>(1, ((width + wanted - 1) / wanted + kSliceQuantum - 1) / kSliceQuantum);
  RowLaunch launch;
  launch.slice_width = std::max(quanta * kSliceQuantum, minimum_width);
  launch.slices = std::max<int64_t>(1, (width + launch.slice_width - 1) / launch.slice_width);
  launch.threads = threads_for(std::min(width, launch.slice_width), 2 * kLogitsPerTile);
  return launch;
}

// Statistics: one row a block, as long as that fills the device twice over; blocks of few threads, since other rows keep
// the multiprocessor busy while one is reduced. (Measured on an H200, bf16 [4096, 18992]: 72 us with two tiles a thread,
// 59 us with sixteen.) Fewer rows are cut, and a second, tiny kernel merges the slices; not below 16384 logits a slice,
// where that kernel would cost more than is gained.
inline RowLaunch statistics_launch(int64_t rows, int64_t width, int multiprocessors, int logit_bytes) {
  const int64_t fill = 2 * int64_t(multiprocessors);
  if (rows >= fill) return {threads_for(width, kBytesOfAWholeRow / logit_bytes), 1, std::max<int64_t>(width, 1)};
  return cut_rows(rows, width, fill, 4 * kSliceQuantum);
}

// Gradient: nothing to reduce, so rows are always cut into slices of about 32768 logits (4 tiles a thread); the tail of
// a grid of few, long blocks is what would be lost otherwise.
inline RowLaunch gradient_launch(int64_t rows, int64_t width, int multiprocessors) {
  const int64_t fill = std::max<int64_t>(4 * int64_t(multiprocessors), rows * ((width + 32767) / 32768));
  return cut_rows(rows, width, fill, kSliceQuantum);
}

}  // namespace megatron_rlvr
