// 8 floats in an AVX2 register, with the operations that the row kernels use.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "exponential.h"
#include "number_types.h"

namespace megatron_rlvr::cpu {
namespace {

struct Vector {
  static constexpr int kLanes = 8;
  using Floats = __m256;
  using Mask = __m256;

  static Floats set(float value) { return _mm256_set1_ps(value); }
  static Floats load(const float* p) { return _mm256_loadu_ps(p); }
  static Floats load(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static Floats load(const Float16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
  static void store(BFloat16* p, Floats v) {  // rounds to nearest, ties to even; NaN stays NaN
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
    const __m128i low = _mm256_castsi256_si128(rounded), high = _mm256_extracti128_si256(rounded, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
  }
  static void store(Float16* p, Floats v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats maximum(Floats a, Floats b) { return _mm256_max_ps(a, b); }

  // 2^(n + offset) for n + offset >= -126, with n in the low bits of `rounded`. For NaN any result will do: e^x stays
  // NaN.
  static Floats power_of_two(Floats rounded, int offset) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(rounded), 23);  // the high bits of `rounded` fall off
    return _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32((127 + offset) << 23)));
  }
  // e^x = q 2^n with n an integer and `rounded` = n + 1.5 * 2^23. Adding that number is cheaper than rounding and
  // converting, which take two instructions each on Intel.
  static Floats split_exponential(Floats x, Floats& rounded) {
    const Floats rounder = set(12582912.0f);
    rounded = multiply_add(x, set(kLog2OfE), rounder);
    const Floats r = _mm256_fnmadd_ps(subtract(rounded, rounder), set(kLn2), x);
    Floats q = multiply_add(set(kQ4), r, set(kQ3));
    q = multiply_add(q, r, set(kQ2));
    q = multiply_add(q, r, set(kQ1));
    q = multiply_add(q, r, set(kQ0));
    q = multiply_add(q, r, set(1.0f));
    q = multiply_add(q, r, set(1.0f));
    return q;
  }
  // e^x for x <= 0, valid where `live`, which is false for x so low that e^x is denormal or 0. NaN is live and stays
  // NaN.
  static Floats exponential(Floats x, Mask& live) {
    live = _mm256_cmp_ps(x, set(kLowestNormalExponent), _CMP_NLT_UQ);
    Floats rounded;
    const Floats q = split_exponential(x, rounded);
    return multiply(q, power_of_two(rounded, 0));
  }
  // y e^x for x <= 0, rounded to a denormal where necessary; 0 where e^x is 0.
  static Floats times_exponential(Floats y, Floats x) {
    const Mask live = _mm256_cmp_ps(x, set(kLowestExponentOfProduct), _CMP_NLT_UQ);
    Floats rounded;
    const Floats q = split_exponential(x, rounded);
    const Floats product = multiply(multiply(q, y), power_of_two(rounded, 64));  // exact; the next one rounds
    return _mm256_and_ps(live, multiply(product, set(0x1p-64f)));
  }

  static Mask not_zero(Floats x, Mask among) {
    return _mm256_and_ps(among, _mm256_cmp_ps(x, set(0.0f), _CMP_NEQ_UQ));
  }
  static int count_zeros(Floats x) {
    return __builtin_popcount(unsigned(_mm256_movemask_ps(_mm256_cmp_ps(x, set(0.0f), _CMP_EQ_OQ))));
  }
  // Adds under the mask and leaves the sum unchanged elsewhere. Values that are masked out may be NaN or infinite.
  static Floats add_where(Mask mask, Floats sum, Floats v) { return add(sum, _mm256_and_ps(mask, v)); }
  static Floats multiply_add_where(Mask mask, Floats a, Floats b, Floats sum) {
    return multiply_add(_mm256_and_ps(mask, a), _mm256_and_ps(mask, b), sum);
  }

  static float largest(Floats v) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
  }
  static double sum(Floats v) {
    const __m256d both = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(v)),
                                       _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
    const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(both), _mm256_extractf128_pd(both, 1));
    return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
  }
};

}  // namespace
}  // namespace megatron_rlvr::cpu
