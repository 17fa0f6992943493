// 16 floats in an AVX-512 register, with the operations that the row kernels use.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "exponential.h"
#include "number_types.h"

namespace megatron_rlvr::cpu {
namespace {

struct Vector {
  static constexpr int kLanes = 16;
  using Floats = __m512;
  using Mask = __mmask16;

  static Floats set(float value) { return _mm512_set1_ps(value); }
  static Floats load(const float* p) { return _mm512_loadu_ps(p); }
  static Floats load(const BFloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static Floats load(const Float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
  static void store(BFloat16* p, Floats v) {  // rounds to nearest, ties to even; NaN stays NaN
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
  static void store(Float16* p, Floats v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }

  // e^x = q 2^n with n an integer
  static Floats split_exponential(Floats x, Floats& n) {
    const Floats rounder = set(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    n = subtract(multiply_add(x, set(kLog2OfE), rounder), rounder);
    const Floats r = _mm512_fnmadd_ps(n, set(kLn2), x);
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
    live = _mm512_cmp_ps_mask(x, set(kLowestNormalExponent), _CMP_NLT_UQ);
    Floats n;
    const Floats q = split_exponential(x, n);
    return _mm512_scalef_ps(q, n);
  }
  // y e^x for x <= 0, rounded to a denormal where necessary; 0 where e^x is 0.
  static Floats times_exponential(Floats y, Floats x) {
    const Mask live = _mm512_cmp_ps_mask(x, set(kLowestExponentOfProduct), _CMP_NLT_UQ);
    Floats n;
    const Floats q = split_exponential(x, n);
    return _mm512_maskz_scalef_ps(live, multiply(q, y), n);
  }

  static Mask not_zero(Floats x, Mask among) { return _mm512_mask_cmp_ps_mask(among, x, set(0.0f), _CMP_NEQ_UQ); }
  static int count_zeros(Floats x) { return __builtin_popcount(_mm512_cmp_ps_mask(x, set(0.0f), _CMP_EQ_OQ)); }
  // Adds under the mask and leaves the sum unchanged elsewhere. Values that are masked out may be NaN or infinite.
  static Floats add_where(Mask mask, Floats sum, Floats v) { return _mm512_mask_add_ps(sum, mask, sum, v); }
  static Floats multiply_add_where(Mask mask, Floats a, Floats b, Floats sum) {
    return _mm512_mask3_fmadd_ps(a, b, sum, mask);
  }

  static float largest(Floats v) { return _mm512_reduce_max_ps(v); }
  static double sum(Floats v) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
  }
};

}  // namespace
}  // namespace megatron_rlvr::cpu
