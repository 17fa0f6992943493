// Runs CUDA kernels on the CPU, for tests: the same kernel source, compiled by the host compiler with this header.
//
// What is emulated: a grid of blocks, each block run by one OS thread; in it every CUDA thread is a fiber that runs
// until it waits for others (a barrier, a shuffle) or ends. So threads of a block interleave at every synchronisation,
// in an order that tests choose, and blocks run truly concurrently.
// What is checked on the way: divergent or missing barriers, shuffles that lanes never reach, misaligned 16-byte
// accesses. Under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer the same run also reports accesses
// out of bounds and data races between CUDA threads: fibers are made known to the sanitizers, and only what
// synchronises on a GPU makes an edge there.
// What is counted: bytes through global load and store intrinsics (traffic.h).
// What is not: time, occupancy, memory coalescing, caches, and hardware rounding beyond the error bounds of language.h.
//
//   language.h    qualifiers, vector types, bf16 and fp16, math intrinsics
//   fiber.h       switching between CUDA threads, and telling the sanitizers
//   block.h       one block: scheduling, barriers, exchange in a warp
//   grid.h        launches
//   traffic.h     counted global loads and stores, atomics
//   intrinsics.h  the names that kernels use
#pragma once
#include "block.h"
#include "fiber.h"
#include "grid.h"
#include "intrinsics.h"
#include "language.h"
#include "traffic.h"
