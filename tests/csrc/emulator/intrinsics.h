// The names by which kernels know their place and their neighbours.
#pragma once
#include "block.h"

namespace simt {

SIMT_HIDDEN inline uint3 thread_index() { return {running->current, 0, 0}; }
SIMT_HIDDEN inline uint3 block_index() { return running->block_index; }
SIMT_HIDDEN inline uint3 block_size() { return running->block_size; }
SIMT_HIDDEN inline uint3 grid_size() { return running->grid_size; }

}  // namespace simt

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_size())
#define gridDim (simt::grid_size())
#define __syncthreads() simt::barrier(__LINE__)

// Each in a few exchanges: in round `distance`, lanes whose numbers differ by it swap what they have gathered so far.
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  for (unsigned distance = 16; distance > 0; distance /= 2) {
    const unsigned lane = simt::thread_index().x % simt::kWarpSize;
    value = std::max(value, unsigned(simt::exchange(mask, value, lane ^ distance)));
  }
  return value;
}
inline int __reduce_add_sync(unsigned mask, int value) {
  for (unsigned distance = 16; distance > 0; distance /= 2) {
    const unsigned lane = simt::thread_index().x % simt::kWarpSize;
    value += int(simt::exchange(mask, unsigned(value), lane ^ distance));
  }
  return value;
}
inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  const unsigned lane = simt::thread_index().x % simt::kWarpSize;
  unsigned bits = unsigned(predicate) << lane;
  for (unsigned distance = 16; distance > 0; distance /= 2) {
    bits |= unsigned(simt::exchange(mask, bits, lane ^ distance));
  }
  return bits;
}

template <class Value>
inline Value __shfl_xor_sync(unsigned mask, Value value, int lane_mask) {
  static_assert(sizeof(Value) <= sizeof(uint64_t), "shuffles move at most 8 bytes");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  word = simt::exchange(mask, word, simt::thread_index().x % simt::kWarpSize ^ unsigned(lane_mask));
  std::memcpy(&value, &word, sizeof value);
  return value;
}
