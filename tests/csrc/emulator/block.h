// One block of CUDA threads: which runs next, barriers, and the exchange of values in a warp.
#pragma once
#include <functional>
#include <vector>

#include "fiber.h"
#include "language.h"

namespace simt {

constexpr unsigned kWarpSize = 32;

struct Warp {
  uint64_t value[kWarpSize];
  unsigned arrived = 0;     // lanes at the current meeting point
  unsigned generation = 0;  // meetings so far
};

struct Block {
  Scheduler scheduler;
  std::vector<Fiber> fiber_storage;
  std::vector<Warp> warp_storage;
  std::vector<unsigned> order_storage;
  Fiber* fibers = nullptr;  // raw, for the hidden functions
  Warp* warps = nullptr;
  unsigned threads = 0;
  unsigned current = 0;  // the thread that runs
  unsigned live = 0;
  unsigned barrier_arrived = 0, barrier_generation = 0;
  int barrier_line = 0;
  const std::function<void()>* body = nullptr;
  uint3 block_index{0, 0, 0}, block_size{1, 1, 1}, grid_size{1, 1, 1};
  uint64_t loaded_bytes = 0, stored_bytes = 0;  // see traffic.h
};

inline thread_local Block* running = nullptr;

SIMT_HIDDEN inline void yield() { suspend(running->scheduler, running->fibers[running->current]); }

SIMT_HIDDEN inline void mark_done() {
  running->fibers[running->current].done = true;
  running->live--;
}

SIMT_HIDDEN inline Block& running_block() { return *running; }

inline void fiber_entry() {
  Block& block = running_block();
  arrive(block.scheduler);
  acquire(&block.body);  // what the host did before the launch
  (*block.body)();
  release(&block.live);  // what the block did is seen after it
  mark_done();
  yield();
  fail("a finished thread was resumed", 0);
}

SIMT_HIDDEN inline void barrier(int line) {
  Block& block = *running;
  const unsigned generation = block.barrier_generation;
  if (block.barrier_arrived == 0) block.barrier_line = line;
  if (block.barrier_line != line) fail("__syncthreads() divergence: threads wait at different lines", block.current);
  release(&block.barrier_generation);
  if (++block.barrier_arrived == block.threads) {
    block.barrier_arrived = 0;
    block.barrier_generation++;
  }
  while (block.barrier_generation == generation) yield();
  acquire(&block.barrier_generation);
}

// Every lane of the mask leaves a value, then takes that of lane `source`; its own where that lane is not in the mask.
// No memory fence, as on a GPU.
SIMT_HIDDEN inline uint64_t exchange(unsigned mask, uint64_t value, unsigned source) {
  Block& block = *running;
  const unsigned lane = block.current % kWarpSize;
  Warp& warp = block.warps[block.current / kWarpSize];
  if (!(mask >> lane & 1u)) fail("a lane calls a shuffle whose mask does not name it", block.current);
  for (int phase = 0; phase < 2; ++phase) {  // all have left theirs; all have taken theirs
    const unsigned generation = warp.generation;
    if (phase == 0) {
      warp.value[lane] = value;
    } else if (source < kWarpSize && (mask >> source & 1u)) {
      value = warp.value[source];
    }
    warp.arrived |= 1u << lane;
    if ((warp.arrived & mask) == mask) {
      warp.arrived &= ~mask;
      warp.generation++;
    }
    while (warp.generation == generation) yield();
  }
  return value;
}

// Sum of everything that moves when threads make progress.
SIMT_HIDDEN inline uint64_t progress(const Block& block) {
  uint64_t sum = block.live + uint64_t(block.barrier_generation) * 0x100000000u;
  const unsigned warps = (block.threads + kWarpSize - 1) / kWarpSize;
  for (unsigned i = 0; i < warps; ++i) sum += uint64_t(block.warps[i].generation) << 12;
  return sum;
}

// Fills the order in which the next round resumes threads: 0 ascending, 1 descending, else shuffled by that seed.
SIMT_HIDDEN inline void order_threads(unsigned* order, unsigned threads, unsigned kind, uint64_t& random) {
  for (unsigned i = 0; i < threads; ++i) order[i] = kind == 1 ? threads - 1 - i : i;
  if (kind < 2) return;
  for (unsigned i = threads; i > 1; --i) {
    random = random * 6364136223846793005u + 1442695040888963407u;
    const unsigned j = unsigned((random >> 33) % i);
    const unsigned swapped = order[i - 1];
    order[i - 1] = order[j];
    order[j] = swapped;
  }
}

SIMT_HIDDEN inline void run_threads(Block& block, unsigned* order, unsigned kind, uint64_t random) {
  int idle_rounds = 0;
  while (block.live > 0) {
    const uint64_t before = progress(block);
    order_threads(order, block.threads, kind, random);
    for (unsigned i = 0; i < block.threads; ++i) {
      block.current = order[i];
      if (!block.fibers[block.current].done) resume(block.scheduler, block.fibers[block.current]);
    }
    if (progress(block) != before) {
      idle_rounds = 0;
    } else if (++idle_rounds > 2) {
      fail(block.barrier_arrived ? "deadlock: some threads never reach __syncthreads()"
                                 : "deadlock: some lanes never reach a shuffle", block.current);
    }
  }
}

inline void run_block(Block& block, const std::function<void()>& body, unsigned threads, unsigned order) {
  running = &block;
  block.body = &body;
  block.threads = block.live = threads;
  block.barrier_arrived = 0;
  if (block.fiber_storage.size() < threads) block.fiber_storage.resize(threads);
  block.fibers = block.fiber_storage.data();
  block.warp_storage.assign((threads + kWarpSize - 1) / kWarpSize, Warp());
  block.warps = block.warp_storage.data();
  block.order_storage.resize(threads);
#if defined(__SANITIZE_THREAD__)
  block.scheduler.thread_sanitizer_fiber = __tsan_get_current_fiber();
#endif
  for (unsigned i = 0; i < threads; ++i) start(block.fibers[i], fiber_entry);
  release(&block.body);
  run_threads(block, block.order_storage.data(), order, order + 1000003u * uint64_t(block.block_index.x));
  acquire(&block.live);
}

}  // namespace simt
