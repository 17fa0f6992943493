// Coefficients of e^r on [-ln 2 / 2, ln 2 / 2] as 1 + r + r^2 q(r), the same for every instruction set: the relative
// error of the polynomial is 3e-9 (weighted least squares, Lawson's iteration), so that rounding dominates.
#pragma once

namespace megatron_rlvr::cpu {

constexpr float kLog2OfE = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
constexpr float kQ0 = 0.4999999403953552f;
constexpr float kQ1 = 0.1666652113199234f;
constexpr float kQ2 = 0.04166838899254799f;
constexpr float kQ3 = 0.00836874544620514f;
constexpr float kQ4 = 0.0013814539415761828f;
// e^x would be denormal below: 0 instead in the sums, because denormals cost many cycles and weigh nothing there.
constexpr float kLowestNormalExponent = -87.3f;
// y e^x is 0 below for every y up to 1e6. Above, a gradient underflows gradually, as float64 rounded to float32 does.
constexpr float kLowestExponentOfProduct = -120.0f;

}  // namespace megatron_rlvr::cpu
