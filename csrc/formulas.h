// Every scalar formula of the operators, once: the CPU path, the CUDA kernels and their emulation on the CPU include it.
//
// Notation: z is a raw logit, T the temperature, k = 1/T, p = softmax(z k), H = -sum p ln p, a the sampled token,
// r = pi(a) / pi_old(a) the importance ratio, A the advantage. Everything is fp32, and raw C++17 without torch.
//
// A row is summed up by its raw maximum m and sums over x = (z - m) k <= 0. Three reasons for that shape:
// - the maximum is subtracted before the temperature is applied, so that logits of scale 100 lose nothing to rounding;
// - the entropy, ln(sum e^x) - (sum x e^x)/(sum e^x), adds two terms that are never negative: nothing cancels;
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

// e^x is 0 in fp32 long before this, so a product x e^x with x clamped here is 0 where x = -inf would make it NaN.
// The clamp loses no NaN: e^x is taken of the unclamped x.
constexpr float kLowestExponent = -1.0e4f;

// A target that is ignored (padding, prompt): its log-prob is 0 and has no gradient; the row's entropy is still exact.
constexpr int64_t kIgnoredTarget = -100;

// ---------------------------------------------------------------------------------------------- statistics of a row

struct RowSums {
  float maximum = -INFINITY;         // m, in raw logits; -inf where nothing finite was seen yet
  float exponential = 0.0f;          // sum e^x
  float exponential_x = 0.0f;        // sum e^x x
  float squared = 0.0f;              // sum e^2x         second moments, used only where asked for
  float squared_x = 0.0f;            // sum e^2x x
};

// What is subtracted from logits: an all -inf stretch has no maximum to subtract (-inf - -inf is NaN), and any number
// will do since e^-inf is 0 all the same.
MEGATRON_RLVR_FORMULA float shift_of(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

// x, safe to multiply by a power of e^x that may be 0.
MEGATRON_RLVR_FORMULA float clamped_exponent(float x) { return x > kLowestExponent ? x : kLowestExponent; }

// The sums re-expressed relative to another shift, at least as large as the own maximum.
template <bool kSecondMoments>
MEGATRON_RLVR_FORMULA RowSums rescaled(const RowSums& sums, float maximum, float inverse_temperature) {
  const float difference = (sums.maximum - shift_of(maximum)) * inverse_temperature;
  const float scale = expf(difference);
  const float offset = clamped_exponent(difference);
  RowSums out;
  out.maximum = maximum;
  out.exponential = sums.exponential * scale;
  out.exponential_x = (sums.exponential_x + sums.exponential * offset) * scale;
  if (kSecondMoments) {
    const float scale_squared = scale * scale;
    out.squared = sums.squared * scale_squared;
    out.squared_x = (sums.squared_x + sums.squared * offset) * scale_squared;
  }
  return out;
}

// Statistics of the union of two disjoint sets of logits; exact up to rounding, commutative, NaN if either has one.
template <bool kSecondMoments>
MEGATRON_RLVR_FORMULA RowSums merged(const RowSums& a, const RowSums& b, float inverse_temperature) {
  const float maximum = a.maximum > b.maximum ? a.maximum : b.maximum;
  const RowSums left = rescaled<kSecondMoments>(a, maximum, inverse_temperature);
  const RowSums right = rescaled<kSecondMoments>(b, maximum, inverse_temperature);
  RowSums out;
  out.maximum = maximum;
  out.exponential = left.exponential + right.exponential;
  out.exponential_x = left.exponential_x + right.exponential_x;
  if (kSecondMoments) {
    out.squared = left.squared + right.squared;
    out.squared_x = left.squared_x + right.squared_x;
  }
  return out;
}

// A row can be normalised iff this holds: NaN, +inf and rows of nothing but -inf fail it.
MEGATRON_RLVR_FORMULA bool is_normalisable(const RowSums& sums) {
  return sums.exponential >= 0.5f && sums.exponential < INFINITY;  // the maximum itself contributes e^0 = 1
}

// ln sum e^x: ln p = x - log_normaliser.
MEGATRON_RLVR_FORMULA float log_normaliser(const RowSums& sums) { return logf(sums.exponential); }

MEGATRON_RLVR_FORMULA float log_probability(float logit, float maximum, float log_normaliser, float inverse_temperature) {
  return (logit - maximum) * inverse_temperature - log_normaliser;
}

// H = -sum p ln p
MEGATRON_RLVR_FORMULA float entropy(const RowSums& sums) {
  return logf(sums.exponential) - sums.exponential_x / sums.exponential;
}

// sum p^2
MEGATRON_RLVR_FORMULA float sum_squared_probability(const RowSums& sums) {
  return sums.squared / (sums.exponential * sums.exponential);
}

// sum p^2 ln p
MEGATRON_RLVR_FORMULA float sum_squared_probability_logprob(const RowSums& sums) {
  return (sums.squared_x - sums.squared * logf(sums.exponential)) / (sums.exponential * sums.exponential);
}

// ------------------------------------------------------------------------------- gradient of (log-prob, entropy)

// With g, h the gradients of the loss to the row's log-prob and entropy, for every logit z_i with x_i = (z_i - m) k:
//   d/dz_i = k [ g (1[i = a] - p_i) - h p_i (ln p_i + H) ] = p_i (constant + linear x_i) + 1[i = a] k g
struct LogitGradient {
  float constant;
  float linear;
  float target;  // k g
};

MEGATRON_RLVR_FORMULA LogitGradient logit_gradient(float gradient_logprob, float gradient_entropy, float log_normaliser,
                                                   float entropy, float inverse_temperature) {
  LogitGradient out;
  out.constant = inverse_temperature * (gradient_entropy * (log_normaliser - entropy) - gradient_logprob);
  out.linear = -inverse_temperature * gradient_entropy;
  out.target = inverse_temperature * gradient_logprob;
  return out;
}

// Gradient to one logit that is not the target's; probability must be e^(x - log_normaliser) of the unclamped x.
MEGATRON_RLVR_FORMULA float gradient_at(const LogitGradient& gradient, float probability, float x) {
  return probability * (gradient.constant + gradient.linear * clamped_exponent(x));
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

// 1 to 4 for E1 to E4 (E1 and E4 lower entropy, E2 and E3 raise it), 0 for a token in none: A = 0, or -ln p = H.
MEGATRON_RLVR_FORMULA int entropy_region(float logprob, float entropy, float advantage) {
  const float surprise = -logprob;
  if (!(surprise < entropy || surprise > entropy)) return 0;
  if (advantage > 0.0f) return surprise < entropy ? 1 : 2;
  if (advantage < 0.0f) return surprise < entropy ? 3 : 4;
  return 0;
}

// First-order change of the entropy for a step that raises ln pi(a) by a unit gradient, up to the learning rate:
// -[ p_a (ln p_a + H) - sum p^2 (ln p + H) ]; the change of one token's objective is this times r A.
MEGATRON_RLVR_FORMULA float entropy_change_coefficient(float logprob, float entropy, float sum_squared_probability,
                                                       float sum_squared_probability_logprob) {
  const float own = expf(logprob) * (logprob + entropy);
  return sum_squared_probability_logprob + entropy * sum_squared_probability - own;
}

}  // namespace megatron_rlvr
