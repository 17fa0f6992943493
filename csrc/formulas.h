// Every scalar formula of the operators. The CPU kernels, the CUDA kernels and their emulator include this one file.
//
// Notation: z is a raw logit, T the temperature, k = 1/T, p = softmax(z k), H = -sum p ln p, a the sampled token,
// r = pi(a) / pi_old(a) the importance ratio, A the advantage. Plain C++17 without torch. Row statistics exist in
// float32, for what is done per logit, and in float64, for what is done per row and costs nothing there.
//
// The statistics of a row are its raw maximum m and sums over x = (z - m) k <= 0, in a form that keeps precision:
// - the maximum is subtracted before the temperature is applied, so logits of scale 100 lose nothing to rounding;
// - sum e^x is stored as *excess* = sum e^x - 1, summed without the maximum's own e^0, so ln sum e^x = log1p(excess)
//   and 1 - p of a token that is almost certain (most tokens late in training) keep their relative accuracy;
// - the entropy, log1p(excess) - (sum x e^x) / (1 + excess), adds two terms that are never negative: nothing cancels;
// - two of them merge exactly, whether they come from lanes, slices of a row or tensor-parallel shards.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "kernel_arguments.h"

#if defined(__CUDACC__)
#define MEGATRON_RLVR_FORMULA __host__ __device__ __forceinline__
#else
#define MEGATRON_RLVR_FORMULA inline
#endif

namespace megatron_rlvr {

// e^x underflows to 0 long before this, so x e^x with x clamped here is 0, where x = -inf would make it NaN. The clamp
// hides no NaN, because e^x is taken of the unclamped x.
constexpr float kLowestExponent = -1.0e4f;

// ---------------------------------------------------------------------------------------------- statistics of a row

MEGATRON_RLVR_FORMULA float exponential_of(float x) { return expf(x); }
MEGATRON_RLVR_FORMULA double exponential_of(double x) { return exp(x); }
MEGATRON_RLVR_FORMULA float log_one_plus(float x) { return log1pf(x); }
MEGATRON_RLVR_FORMULA double log_one_plus(double x) { return log1p(x); }

// Without logits, or with nothing but -inf among them, the maximum is -inf and the excess has no meaning.
template <class Real>
struct RowSums {
  Real maximum = -INFINITY;      // m, in raw logits
  Real excess = 0;               // sum e^x - 1
  Real exponential_x = 0;        // sum e^x x
  Real squared_excess = 0;       // sum e^2x - 1; second moments, filled only on request
  Real squared_x = 0;            // sum e^2x x
};

// The number to subtract from logits. Where all are -inf there is no maximum to subtract (-inf - -inf is NaN), and any
// number will do, because e^-inf is 0 all the same.
template <class Real>
MEGATRON_RLVR_FORMULA Real shift_of(Real maximum) { return maximum == -INFINITY ? Real(0) : maximum; }

// x, safe to multiply by a power of e^x that may be 0.
template <class Real>
MEGATRON_RLVR_FORMULA Real clamped_exponent(Real x) { return x > kLowestExponent ? x : Real(kLowestExponent); }

// Makes `maximum`, which must be at least the current one, the shift of the sums. It is not part of the sums yet, so
// the e^0 of the old maximum now enters the excess: (own + excess) e^difference. `own` is 1; it is 0 for sums that
// share their maximum with other sums, of which only one leaves its e^0 out.
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

// Statistics of the union of two disjoint sets of logits. Exact up to rounding; NaN if either holds one.
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

// Whether a row can be normalised. False for NaN, for +inf and for a row of nothing but -inf.
template <class Real>
MEGATRON_RLVR_FORMULA bool is_normalisable(const RowSums<Real>& sums) {
  return sums.maximum > -INFINITY && sums.maximum < INFINITY && sums.excess < INFINITY;
}

// ln sum e^x: ln p = x - log_normaliser.
template <class Real>
MEGATRON_RLVR_FORMULA Real log_normaliser(const RowSums<Real>& sums) { return log_one_plus(sums.excess); }

// ln p of one logit.
template <class Real>
MEGATRON_RLVR_FORMULA Real log_probability(Real logit, Real maximum, Real log_normaliser, Real inverse_temperature) {
  return (logit - maximum) * inverse_temperature - log_normaliser;
}

// H = -sum p ln p
template <class Real>
MEGATRON_RLVR_FORMULA Real entropy(const RowSums<Real>& sums, Real log_normaliser) {
  return log_normaliser - sums.exponential_x / (1 + sums.excess);
}

// sum p^2
template <class Real>
MEGATRON_RLVR_FORMULA Real sum_squared_probability(const RowSums<Real>& sums) {
  const Real exponential = 1 + sums.excess;
  return (1 + sums.squared_excess) / (exponential * exponential);
}

// sum p^2 ln p
template <class Real>
MEGATRON_RLVR_FORMULA Real sum_squared_probability_logprob(const RowSums<Real>& sums, Real log_normaliser) {
  const Real exponential = 1 + sums.excess;
  return sums.squared_x / (exponential * exponential) - log_normaliser * sum_squared_probability(sums);
}

// The results of a row's sums, rounded to float32 once. All but the maximum are NaN if `is_normalisable` is false.
struct FinishedRow {
  bool is_normalisable;
  float maximum;
  float log_sum;
  float entropy;
  float logprob;              // of the target; 0 for an ignored one
  float squared;              // sum p^2
  float squared_logprob;      // sum p^2 ln p
};

template <bool kSecondMoments>
MEGATRON_RLVR_FORMULA FinishedRow finished_row(const RowSums<double>& sums, float target_logit, int64_t target,
                                               double inverse_temperature) {
  FinishedRow row;
  row.is_normalisable = is_normalisable(sums);
  const double log_sum = row.is_normalisable ? log_normaliser(sums) : double(NAN);
  row.maximum = float(sums.maximum);
  row.log_sum = float(log_sum);
  row.entropy = row.is_normalisable ? float(entropy(sums, log_sum)) : NAN;
  row.logprob = float(log_probability(double(target_logit), sums.maximum, log_sum, inverse_temperature));
  if (target < 0) row.logprob = row.is_normalisable ? 0.0f : NAN;
  if (kSecondMoments) {
    row.squared = row.is_normalisable ? float(sum_squared_probability(sums)) : NAN;
    row.squared_logprob = row.is_normalisable ? float(sum_squared_probability_logprob(sums, log_sum)) : NAN;
  }
  return row;
}

// Whether a target is valid: an id of the vocabulary, or kIgnoredTarget.
MEGATRON_RLVR_FORMULA bool is_valid_target(int64_t target, int64_t vocabulary) {
  return target == kIgnoredTarget || (target >= 0 && target < vocabulary);
}

// ------------------------------------------------------------------------------- gradient of (log-prob, entropy)

// With g and h the gradients of the loss to the row's log-prob and entropy, for every logit z_i with x_i = (z_i - m) k:
//   d/dz_i = k [ g (1[i = a] - p_i) - h p_i (ln p_i + H) ]
// which is p_i (constant + linear x_i) for every logit but the target's.
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

// Gradient to a logit that is not the target's. `probability` must be that of the unclamped x.
MEGATRON_RLVR_FORMULA float gradient_at(const LogitGradient& gradient, float probability, float x) {
  return probability * (gradient.constant + gradient.linear * clamped_exponent(x));
}

// Gradient to the target's logit. 1 - p is -expm1(ln p): subtracting p from 1 would leave noise where p is almost 1.
MEGATRON_RLVR_FORMULA float gradient_at_target(float gradient_logprob, float gradient_entropy, float logprob,
                                               float entropy, float inverse_temperature) {
  const float probability = expf(logprob);
  const float from_entropy = probability * (clamped_exponent(logprob) + entropy);
  return inverse_temperature * (-gradient_logprob * expm1f(logprob) - gradient_entropy * from_entropy);
}

// ---------------------------------------------------------------------------------------- clipped objective

// A ratio counts up to `high` where A > 0, and from `low` up to `dual_clip` where A < 0.
struct RatioBounds {
  float low;
  float high;
  float dual_clip;
};

// r >= 1 - eps_lower(r p_old) and r <= 1 + eps_upper(r p_old), solved for r. The solution does not depend on the
// current policy, so no gradient runs through a threshold. Source: arXiv 2602.09782; closed form derived for this
// project.
MEGATRON_RLVR_FORMULA RatioBounds ratio_bounds(const ClipScalars& clip, float old_probability, float dual_clip) {
  RatioBounds bounds;
  bounds.low = (1.0f - clip.lower_intercept) / (1.0f + clip.lower_slope * old_probability);
  bounds.high = (1.0f + clip.upper_intercept) / (1.0f - clip.upper_slope * old_probability);
  bounds.dual_clip = dual_clip;
  return bounds;
}

// ln r. Equal log-probs have ratio 1, also where both are -inf.
MEGATRON_RLVR_FORMULA float log_ratio_of(float logprob, float old_logprob) {
  return logprob == old_logprob ? 0.0f : logprob - old_logprob;
}

// Which bound, if any, makes the objective of a token flat. NaN leaves the gate open, and so reaches the objective.
enum class Gate : uint8_t { kOpen = 0, kClippedHigh = 1, kClippedLow = 2, kDualClipped = 3 };

MEGATRON_RLVR_FORMULA Gate gate_of(float ratio, float advantage, const RatioBounds& bounds) {
  if (advantage > 0.0f && ratio > bounds.high) return Gate::kClippedHigh;
  if (advantage < 0.0f && ratio < bounds.low) return Gate::kClippedLow;
  if (advantage < 0.0f && ratio > bounds.dual_clip) return Gate::kDualClipped;
  return Gate::kOpen;
}

// e^x where float32 has no room for it. No double exponential: its code would cost the CUDA kernel registers.
MEGATRON_RLVR_FORMULA double wide_exponential(float x) {
  const double quarter = expf(0.25f * x);
  return (quarter * quarter) * (quarter * quarter);
}

// factor * A * weight in float32, and the largest finite number of that sign where it is too large. NaN and an infinite
// A or weight stay visible.
MEGATRON_RLVR_FORMULA float saturated_product(double factor, float advantage, float weight) {
  const double scale = double(advantage) * double(weight);
  const double product = (factor > 1.0e300 ? 1.0e300 : factor) * scale;  // 0, not NaN, where the weight is 0
  if (!(fabs(scale) < INFINITY)) return float(product);
  return product > FLT_MAX ? FLT_MAX : product < -FLT_MAX ? -FLT_MAX : float(product);
}

struct TokenObjective {
  float objective;
  float gradient;  // d objective / d ln pi(a)
  Gate gate;
};

// weight * min(r A, clip(r, low, high) A), and no less than weight * dual_clip * A where A < 0. The gradient is
// weight * r A where the gate is open, because d r = r d ln pi, and 0 where a bound acts. A = 0 gives 0. Value and
// gradient are finite for any log-ratio: exact where float32 holds the product, even if it does not hold r, and
// saturated elsewhere.
MEGATRON_RLVR_FORMULA TokenObjective token_objective(float log_ratio, float advantage, float weight,
                                                     const RatioBounds& bounds) {
  const float ratio = expf(log_ratio);
  TokenObjective out = {0.0f, 0.0f, gate_of(ratio, advantage, bounds)};
  if (advantage == 0.0f) return out;
  float factor = ratio;
  if (out.gate == Gate::kClippedHigh) factor = bounds.high;
  if (out.gate == Gate::kClippedLow) factor = bounds.low;
  if (out.gate == Gate::kDualClipped) factor = bounds.dual_clip;
  out.objective = factor * advantage * weight;
  if (!(fabsf(out.objective) <= FLT_MAX) || ratio < FLT_MIN) {
    out.objective = saturated_product(out.gate == Gate::kOpen ? wide_exponential(log_ratio) : factor, advantage, weight);
  }
  if (out.gate == Gate::kOpen) out.gradient = out.objective;
  return out;
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
