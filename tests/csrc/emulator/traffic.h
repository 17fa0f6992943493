// Global memory: loads and stores with cache hints, counted and checked for alignment, and atomics.
#pragma once
#include "block.h"

namespace simt {

template <class Word>
inline void check_alignment(const Word* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(Word) != 0) fail("misaligned access", running->current);
}

SIMT_HIDDEN inline void count_load(size_t bytes) { running->loaded_bytes += bytes; }
SIMT_HIDDEN inline void count_store(size_t bytes) { running->stored_bytes += bytes; }

template <class Word>
inline Word counted_load(const Word* address) {
  check_alignment(address);
  count_load(sizeof(Word));
  return *address;
}

template <class Word>
inline void counted_store(Word* address, Word value) {
  check_alignment(address);
  count_store(sizeof(Word));
  *address = value;
}

}  // namespace simt

template <class Word>
inline Word __ldg(const Word* address) {
  return simt::counted_load(address);
}
template <class Word>
inline Word __ldcg(const Word* address) {
  return simt::counted_load(address);
}
template <class Word>
inline void __stwb(Word* address, Word value) {
  simt::counted_store(address, value);
}

inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  simt::count_load(sizeof value);
  simt::count_store(sizeof value);
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline int atomicMin(int* address, int value) {
  simt::count_load(sizeof value);
  simt::count_store(sizeof value);
  int seen = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (value < seen &&
         !__atomic_compare_exchange_n(address, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}
// Used on shared memory, whose bytes are not counted.
inline unsigned atomicOr(unsigned* address, unsigned value) {
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}
