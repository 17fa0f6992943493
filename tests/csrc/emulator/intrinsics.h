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

template <class Value>
inline Value __shfl_xor_sync(unsigned mask, Value value, int lane_mask) {
  static_assert(sizeof(Value) <= sizeof(uint64_t), "shuffles move at most 8 bytes");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  word = simt::exchange(mask, word, simt::thread_index().x % simt::kWarpSize ^ unsigned(lane_mask));
  std::memcpy(&value, &word, sizeof value);
  return value;
}
