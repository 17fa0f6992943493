// Launches: the blocks of a grid, spread over a few OS threads.
#pragma once
#include <algorithm>
#include <memory>
#include <thread>
#include <vector>

#include "block.h"

namespace simt {

// How the next launches run. `order`: in which order threads and blocks are taken, 0 ascending, 1 descending, any other
// number shuffled by it.
struct Settings {
  unsigned order = 0;
  unsigned workers = 2;
};
inline Settings& settings() {
  static Settings instance;
  return instance;
}

// Bytes of global memory that kernels moved since the last reset.
struct Traffic {
  uint64_t loaded = 0, stored = 0;
};
inline Traffic& traffic() {
  static Traffic instance;
  return instance;
}

// Blocks are kept between launches, for their stacks; taken and put back by the launching thread only, so that no lock
// makes workers look ordered to ThreadSanitizer.
inline std::vector<std::unique_ptr<Block>>& idle_blocks() {
  static thread_local std::vector<std::unique_ptr<Block>> blocks;
  return blocks;
}

inline void launch(int64_t blocks, int64_t threads, const std::function<void()>& body) {
  if (blocks < 1 || blocks > 0x7fffffff) fail("a grid must have 1 to 2^31 - 1 blocks", 0);
  if (threads < 1 || threads > 1024) fail("a block must have 1 to 1024 threads", 0);
  const unsigned order = settings().order;
  std::vector<unsigned> block_order(static_cast<size_t>(blocks));
  uint64_t random = order;
  order_threads(block_order.data(), unsigned(blocks), order, random);

  // Neighbouring blocks go to different workers, always: races between blocks must not hide behind a busy machine.
  const int64_t workers = std::min<int64_t>(settings().workers, blocks);
  const auto work = [&](Block& block, int64_t worker) {
    block.block_size = {unsigned(threads), 1, 1};
    block.grid_size = {unsigned(blocks), 1, 1};
    block.loaded_bytes = block.stored_bytes = 0;
    for (int64_t i = worker; i < blocks; i += workers) {
      block.block_index = {block_order[size_t(i)], 0, 0};
      run_block(block, body, unsigned(threads), order);
    }
  };
  std::vector<std::unique_ptr<Block>>& idle = idle_blocks();
  while (int64_t(idle.size()) < workers) idle.push_back(std::make_unique<Block>());
  std::vector<std::thread> others;
  for (int64_t i = 1; i < workers; ++i) others.emplace_back(work, std::ref(*idle[size_t(i)]), i);
  work(*idle[0], 0);
  for (std::thread& other : others) other.join();
  for (int64_t i = 0; i < workers; ++i) {
    traffic().loaded += idle[size_t(i)]->loaded_bytes;
    traffic().stored += idle[size_t(i)]->stored_bytes;
  }
}

}  // namespace simt
