// 4 floats in the compiler's portable vector type (SSE2 on x86-64, NEON on Arm), with the operations of the row
// kernels.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "exponential.h"
#include "number_types.h"

namespace megatron_rlvr::cpu {
namespace {

struct Vector {
  static constexpr int kLanes = 4;
  typedef float Floats __attribute__((vector_size(16)));
  typedef int32_t Mask __attribute__((vector_size(16)));

  static Floats set(float value) { return Floats{value, value, value, value}; }
  static Floats load(const float* p) {
    Floats v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static Floats load(const BFloat16* p) { return Floats{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
  static Floats load(const Float16* p) { return Floats{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
  static void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }
  template <class T>
  static void store(T* p, Floats v) {
    for (int i = 0; i < kLanes; i++) assign(p[i], v[i]);
  }

  static Floats add(Floats a, Floats b) { return a + b; }
  static Floats subtract(Floats a, Floats b) { return a - b; }
  static Floats multiply(Floats a, Floats b) { return a * b; }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
  static Floats maximum(Floats a, Floats b) { return a > b ? a : b; }
  static Floats masked(Mask mask, Floats v) { return reinterpret_cast<Floats>(mask & reinterpret_cast<Mask>(v)); }

  static Floats power_of_two(Mask n) { return reinterpret_cast<Floats>((n + 127) << 23); }  // n >= -126
  // e^x = q 2^n with n an integer
  static Floats split_exponential(Floats x, Mask& n) {
    constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    const Floats shifted = masked(x >= set(kLowestExponentOfProduct), x) * set(kLog2OfE) + set(kRounder);
    n = reinterpret_cast<Mask>(shifted) - 0x4b400000;
    const Floats whole = shifted - set(kRounder);
    // ln 2 as two summands, the first with few bits: without a fused multiply-add, `whole` times it must be exact
    const Floats r = (x - whole * set(0.693359375f)) - whole * set(-2.12194440e-4f);
    Floats q = set(kQ4) * r + set(kQ3);
    q = q * r + set(kQ2);
    q = q * r + set(kQ1);
    q = q * r + set(kQ0);
    return q * (r * r) + (r + set(1.0f));
  }
  // e^x for x <= 0, valid where `live`, which is false for x so low that e^x is denormal or 0. NaN is live and stays
  // NaN.
  static Floats exponential(Floats x, Mask& live) {
    live = ~(x < set(kLowestNormalExponent));
    Mask n;
    const Floats q = split_exponential(x, n);
    return q * power_of_two(n);
  }
  // y e^x for x <= 0, rounded to a denormal where necessary; 0 where e^x is 0.
  static Floats times_exponential(Floats y, Floats x) {
    Mask n;
    const Floats q = split_exponential(x, n);
    const Mask half = n >> 1;
    return masked(~(x < set(kLowestExponentOfProduct)), q * y * power_of_two(half) * power_of_two(n - half));
  }

  static Mask not_zero(Floats x, Mask among) { return among & (x != set(0.0f)); }
  static int count_zeros(Floats x) {
    const Mask zero = x == set(0.0f);
    return -(zero[0] + zero[1] + zero[2] + zero[3]);
  }
  // Adds under the mask and leaves the sum unchanged elsewhere. Values that are masked out may be NaN or infinite.
  static Floats add_where(Mask mask, Floats sum, Floats v) { return sum + masked(mask, v); }
  static Floats multiply_add_where(Mask mask, Floats a, Floats b, Floats sum) { return masked(mask, a * b) + sum; }

  static float largest(Floats v) {
    float out = v[0];
    for (int i = 1; i < kLanes; i++) out = v[i] > out ? v[i] : out;
    return out;
  }
  static double sum(Floats v) { return (double(v[0]) + v[1]) + (double(v[2]) + v[3]); }
};

}  // namespace
}  // namespace megatron_rlvr::cpu
