// CUDA's dialect of C++: qualifiers, vector types, half precisions and math intrinsics.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
// An OS thread runs one block at a time, so a block's shared memory is that thread's; what it holds at the start of a
// block is what the last one left, as on a GPU.
#define __shared__ static thread_local

struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class To, class From>
inline To bit_cast_to(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned bits) { return bit_cast_to<float>(bits); }
inline unsigned __float_as_uint(float value) { return bit_cast_to<unsigned>(value); }

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const unsigned bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};  // NaN
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }

struct __half {
  _Float16 value;
};
struct __half2 {
  __half x, y;
};
inline float __half2float(__half value) { return float(value.value); }
inline __half __float2half_rn(float value) { return {_Float16(value)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half __ushort_as_half(unsigned short bits) { return bit_cast_to<__half>(bits); }
inline unsigned short __half_as_ushort(__half value) { return bit_cast_to<unsigned short>(value); }

namespace simt {

// The instruction ex2.approx.ftz.f32, as inexact as the PTX manual allows: off by up to 2^-22 of the result, here by up
// to 2 units in the last place, by a hash of the argument; 2^0 is 1, and subnormal results are 0.
inline float approximate_exp2(float y) {
  const float exact = std::exp2(y);
  if (exact < 1.1754944e-38f) return 0.0f;
  if (!(exact > 1e-37f && exact < 1e38f) || y == 0.0f) return exact;
  const int error = int((__float_as_uint(y) * 2654435761u >> 16) % 5u) - 2;
  return __uint_as_float(unsigned(int(__float_as_uint(exact)) + error));
}

}  // namespace simt

inline int __ffs(int bits) { return __builtin_ffs(bits); }

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
