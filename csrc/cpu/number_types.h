// The half-precision types as bits, with scalar conversions for processors that have no instructions for them.
#pragma once
#include <cstdint>
#include <cstring>

namespace megatron_rlvr::cpu {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

[[maybe_unused]] inline float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

[[maybe_unused]] inline uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

[[maybe_unused]] inline float to_float(float value) { return value; }
[[maybe_unused]] inline float to_float(BFloat16 value) { return from_bits(uint32_t(value.bits) << 16); }
[[maybe_unused]] inline float to_float(Float16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // infinity, NaN
  if (magnitude >= 0x0400u) return from_bits(sign | ((magnitude << 13) + (112u << 23)));
  const float denormal = float(magnitude) * 0x1p-24f;
  return sign ? -denormal : denormal;
}

// Rounds to nearest, ties to even; NaN stays NaN.
[[maybe_unused]] inline void assign(float& out, float value) { out = value; }
[[maybe_unused]] inline void assign(BFloat16& out, float value) {
  const uint32_t bits = to_bits(value);
  out.bits = value != value ? 0x7fc0u : uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
[[maybe_unused]] inline void assign(Float16& out, float value) {
  const uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to more than the largest number: infinity
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {
    half = (magnitude - (112u << 23) + 0x0fffu + (magnitude >> 13 & 1u)) >> 13;
  } else {  // denormal: adding 2^-1 aligns the ulp of a float to 2^-24 and rounds
    half = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  }
  out.bits = uint16_t(sign | half);
}

}  // namespace
}  // namespace megatron_rlvr::cpu
