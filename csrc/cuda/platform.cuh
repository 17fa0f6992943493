// Where kernel source meets its compiler: nvcc, or the host compiler with the emulator of tests/csrc.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define MEGATRON_RLVR_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<dim3(unsigned(blocks)), dim3(unsigned(threads)), 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#else
#include "simt.h"
#define MEGATRON_RLVR_LAUNCH(kernel, blocks, threads, stream, ...) \
  simt::launch(blocks, threads, [=] { (void)(stream); kernel(__VA_ARGS__); })
#endif

#include "../formulas.h"

namespace megatron_rlvr {

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// The outcome of the launches so far, as every launcher returns it.
inline int launch_status() { return int(cudaGetLastError()); }

}  // namespace megatron_rlvr
