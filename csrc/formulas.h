// Every scalar formula of the operators, once: the CPU path, the CUDA kernels and their emulation include it.
//
// Notation: z is a raw logit, T the temperature, k = 1/T, p = softmax(z k), H = -sum p ln p, a the sampled token,
// r = pi(a) / pi_old(a) the importance ratio, A the advantage. Raw C++17 without torch. Row statistics exist in fp32
// (what is done for every logit) and in fp64 (what is done once a row, and costs nothing there).
//
// A row is summed up by its raw maximum m and sums over x = (z - m) k <= 0. Why in this shape:
// - the maximum is subtracted before the temperature is applied, so that logits of scale 100 lose nothing to rounding;
// - sum e^x is kept as *excess* = sum e^x - 1, summed without the maximum's own e^0, so that ln sum e^x = log1p(excess)
//   and 1 - p of an almost sure token (most tokens, late in training) keep their relative accuracy;
// - the entropy, log1p(excess) - (sum x e^x) / (1 + excess), adds two terms that are never negative: nothing cancels;
// - two of them merge exactly, whether they come from lanes, slices of a row or tensor-parallel shards.
#pragma once
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define MEGATRON_RLVR_FORMULA __host__ __device__ __forceinline__
#else
#define MEGATRON_RLVR_FORMULA inline
#endif

namespace megatron_rlvr {

// e^x is 0 long before this, so a product x e^x with x clamped here is 0 where x = -inf would make it NaN.
// The clamp loses no NaN: e^x is taken of the unclamped x.
constexpr float kLowestExponent = -1.0e4f;

// A target that is ignored (padding, prompt): its log-prob is 0 and has no gradient; the row's entropy is still exact.
constexpr int64_t kIgnoredTarget = -100;

// ---------------------------------------------------------------------------------------------- statistics of a row

MEGATRON_RLVR_FORMULA float exponential_of(float x) { return expf(x); }
MEGATRON_RLVR_FORMULA double exponential_of(double x) { return exp(x); }
MEGATRON_RLVR_FORMULA float log_one_plus(float x) { return log1pf(x); }
MEGATRON_RLVR_FORMULA double log_one_plus(double x) { return log1p(x); }

// Of no logits at all, or of none but -inf: the maximum is -inf, and the excess means nothing.
template <class Real>
struct RowSums {
  Real maximum = -INFINITY;      // m, in raw logits
  Real excess = 0;               // sum e^x - 1
  Real exponential_x = 0;        // sum e^x x
  Real squared_excess = 0;       // sum e^2x - 1     second moments, used only where asked for
  Real squared_x = 0;            // sum e^2x x
};

// What is subtracted from logits: an all -inf stretch has no maximum to subtract (-inf - -inf is NaN), and any number
// will do since e^-inf is 0 all the same.
template <class Real>
MEGATRON_RLVR_FORMULA Real shift_of(Real maximum) { return maximum == -INFINITY ? Real(0) : maximum; }

// x, safe to multiply by a power of e^x that may be 0.
template <class Real>
MEGATRON_RLVR_FORMULA Real clamped_exponent(Real x) { return x > kLowestExponent ? x : Real(kLowestExponent); }

// Makes `maximum`, which is at least the own one, the shift of the sums; the maximum itself is not in them yet. So what
// was the old maximum's own e^0 enters the excess: (own + excess) e^difference. `own` is 1, or 0 for sums that share a
// maximum with others, of which one alone leaves its e^0 out.
template <bool kSecondMoments, class Real>
MEGATRON_RLVR_FORMULA void raise_maximum(RowSums<Real>& sums, Real maximum, Real inverse_temperature, Real own = 1) {
  const Real difference = (sums.maximum - shift_of(maximum)) * inverse_temperature;
  const Real scale = exponential_of(difference);
  const Real offset = clamped_exponent(difference);
  const Real exponential = own + sums.excess;
  sums.maximum = maximum;
  sums.excess = exponential * scale;
  sums.exponential_x = (sums.exponential_x + exponential * offset) * scale;
  if (kSecondMoments) {
    const Real squared = own + sums.squared_excess;
    const Real scale_squared = scale * scale;
    sums.squared_excess = squared * scale_squared;
    sums.squared_x = (sums.squared_x + squared * offset) * scale_squared;
  }
}

// Statistics of the union of two disjoint sets of logits: exact up to rounding, NaN if either has one.
template <bool kSecondMoments, class Real>
MEGATRON_RLVR_FORMULA RowSums<Real> merged(const RowSums<Real>& a, const RowSums<Real>& b, Real inverse_temperature) {
  const bool a_leads = a.maximum >= b.maximum;
  RowSums<Real> out = a_leads ? a : b;
  RowSums<Real> other = a_leads ? b : a;
  raise_maximum<kSecondMoments>(other, out.maximum, inverse_temperature);
  out.excess += other.excess;
  out.exponential_x += other.exponential_x;
  if (kSecondMoments) {
    out.squared_excess += other.squared_excess;
    out.squared_x += other.squared_x;
  }
  return out;
}

// A row can be normalised iff this holds: NaN, +inf and rows of nothing but -inf fail it.
template <class Real>
MEGATRON_RLVR_FORMULA bool is_normalisable(const RowSums<Real>& sums) {
  return sums.maximum > -INFINITY && sums.maximum < INFINITY && sums.excess < INFINITY;
}

// ln sum e^x: ln p = x - log_normaliser.
template <class Real>
MEGATRON_RLVR_FORMULA Real log_normaliser(const RowSums<Real>& sums) { return log_one_plus(sums.excess); }

// ln p of one logit, of the target above all.
template <class Real>
MEGATRON_RLVR_FORMULA Real log_probability(Real logit, Real maximum, Real log_normaliser, Real inverse_temperature) {
  return (logit - maximum) * inverse_temperature - log_normaliser;
}

// H = -sum p ln p
template <class Real>
MEGATRON_RLVR_FORMULA Real entropy(const RowSums<Real>& sums) {
  return log_one_plus(sums.excess) - sums.exponential_x / (1 + sums.excess);
}

// sum p^2
template <class Real>
MEGATRON_RLVR_FORMULA Real sum_squared_probability(const RowSums<Real>& sums) {
  const Real exponential = 1 + sums.excess;
  return (1 + sums.squared_excess) / (exponential * exponential);
}

// sum p^2 ln p
template <class Real>
MEGATRON_RLVR_FORMULA Real sum_squared_probability_logprob(const RowSums<Real>& sums) {
  const Real exponential = 1 + sums.excess;
  return sums.squared_x / (exponential * exponential) - log_one_plus(sums.excess) * sum_squared_probability(sums);
}

// ------------------------------------------------------------------------------- gradient of (log-prob, entropy)

// With g, h the gradients of the loss to the row's log-prob and entropy, for every logit z_i with x_i = (z_i - m) k:
//   d/dz_i = k [ g (1[i = a] - p_i) - h p_i (ln p_i + H) ]
// which is p_i (constant + linear x_i) for all but the target.
struct LogitGradient {
  float constant;
  float linear;
};

MEGATRON_RLVR_FORMULA LogitGradient logit_gradient(float gradient_logprob, float gradient_entropy, float log_normaliser,
                                                   float entropy, float inverse_temperature) {
  LogitGradient out;
  out.constant = inverse_temperature * (gradient_entropy * (log_normaliser - entropy) - gradient_logprob);
  out.linear = -inverse_temperature * gradient_entropy;
  return out;
}

// Gradient to one logit that is not the target's; probability must be that of the unclamped x.
MEGATRON_RLVR_FORMULA float gradient_at(const LogitGradient& gradient, float probability, float x) {
  return probability * (gradient.constant + gradient.linear * clamped_exponent(x));
}

// Gradient to the target's logit. 1 - p is -expm1(ln p): the difference itself would be noise for a sure token.
MEGATRON_RLVR_FORMULA float gradient_at_target(float gradient_logprob, float gradient_entropy, float logprob,
                                               float entropy, float inverse_temperature) {
  const float probability = expf(logprob);
  const float from_entropy = probability * (clamped_exponent(logprob) + entropy);
  return inverse_temperature * (-gradient_logprob * expm1f(logprob) - gradient_entropy * from_entropy);
}

// ---------------------------------------------------------------------------------------- clipped objective

// The four scalars of a step (design.md section 2): eps(p) = intercept + slope p for the lower and the upper threshold.
// The caller has checked that both closed forms exist for p in [0, 1]: slopes in (-1, ...) below, (..., 1) above.
struct ClipScalars {
  float lower_intercept;
  float lower_slope;
  float upper_intercept;
  float upper_slope;
};

struct RatioBounds {
  float low;
  float high;
};

// r >= 1 - eps_lower(r p_old) and r <= 1 + eps_upper(r p_old), solved for r: constant in theta, so no gradient here.
MEGATRON_RLVR_FORMULA RatioBounds ratio_bounds(const ClipScalars& clip, float old_probability) {
  RatioBounds bounds;
  bounds.low = (1.0f - clip.lower_intercept) / (1.0f + clip.lower_slope * old_probability);
  bounds.high = (1.0f + clip.upper_intercept) / (1.0f - clip.upper_slope * old_probability);
  return bounds;
}

enum class Gate : int { kOpen = 0, kClippedHigh = 1, kClippedLow = 2 };

// Where the objective is flat in theta: above the upper bound for A > 0, under the lower one for A < 0.
MEGATRON_RLVR_FORMULA Gate gate(float ratio, float advantage, const RatioBounds& bounds) {
  if (advantage > 0.0f && ratio > bounds.high) return Gate::kClippedHigh;
  if (advantage < 0.0f && ratio < bounds.low) return Gate::kClippedLow;
  return Gate::kOpen;
}

// min(r A, clip(r, low, high) A); A = 0 gives 0 even where the ratio overflowed.
MEGATRON_RLVR_FORMULA float clipped_objective(float ratio, float advantage, const RatioBounds& bounds) {
  if (advantage == 0.0f) return 0.0f;
  const Gate state = gate(ratio, advantage, bounds);
  if (state == Gate::kClippedHigh) return bounds.high * advantage;
  if (state == Gate::kClippedLow) return bounds.low * advantage;
  return ratio * advantage;
}

// d objective / d ln pi(a): r A where the gate is open (d r = r d ln pi), else 0.
MEGATRON_RLVR_FORMULA float objective_gradient(float ratio, float advantage, const RatioBounds& bounds) {
  if (advantage == 0.0f) return 0.0f;
  return gate(ratio, advantage, bounds) == Gate::kOpen ? ratio * advantage : 0.0f;
}

// ---------------------------------------------------------------------------------------- entropy regions

// 1 to 4 for E1 to E4, and 0 for a token in no region: A = 0, or NaN among the three numbers. The border -ln p = H
// belongs to E2 and E4; megatron_rlvr/control/regions.py says why.
MEGATRON_RLVR_FORMULA int entropy_region(float logprob, float entropy, float advantage) {
  const float surprise = -logprob;
  const bool is_likely = surprise < entropy, is_unlikely = surprise >= entropy;
  if (!(is_likely || is_unlikely)) return 0;
  if (advantage > 0.0f) return is_likely ? 1 : 2;
  if (advantage < 0.0f) return is_likely ? 3 : 4;
  return 0;
}

}  // namespace megatron_rlvr
