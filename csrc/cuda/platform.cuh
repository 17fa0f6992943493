// What depends on the compiler of the kernels: nvcc, or the host compiler with the emulator of tests/csrc.
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

constexpr float kLog2OfE = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// 2^y in one instruction, with a relative error of at most 2^-22; 2^0 is exactly 1, and results below 2^-126 are 0.
// Used for every logit: __expf would add a multiplication and the handling of subnormal results.
__device__ __forceinline__ float fast_exp2(float y) {
#if defined(__CUDACC__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(y));
  return result;
#else
  return simt::approximate_exp2(y);
#endif
}

// The status of the launches so far, which every launcher returns.
inline int launch_status() { return int(cudaGetLastError()); }

}  // namespace megatron_rlvr
