// Coefficients of e^r = 1 + r + r^2 q(r) on [-ln 2 / 2, ln 2 / 2], shared by all instruction sets. The relative error
// of the polynomial is 3e-9 (weighted least squares, Lawson's iteration), so rounding dominates.
#pragma once

namespace megatron_rlvr::cpu {

constexpr float kLog2OfE = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
constexpr float kQ0 = 0.4999999403953552f;
constexpr float kQ1 = 0.1666652113199234f;
constexpr float kQ2 = 0.04166838899254799f;
constexpr float kQ3 = 0.00836874544620514f;
constexpr float kQ4 = 0.0013814539415761828f;
// Below this e^x is denormal. The sums use 0 instead: denormals cost many cycles and do not change a sum.
constexpr float kLowestNormalExponent = -87.3f;
// Below this y e^x is 0 for every y up to 1e6. Above it a gradient underflows gradually, as float64 rounded to float32
// does.
constexpr float kLowestExponentOfProduct = -120.0f;

}  // namespace megatron_rlvr::cpu
