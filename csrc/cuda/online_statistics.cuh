// One pass over logits: tiles of them enter the running sums of a warp.
//
// The lanes of a warp share one running maximum. It rises in few tiles (1 + 1/2 + 1/3 + ... of them for logits in
// random order), and only there is work done beyond one exponential and two additions a logit; and at the end the
// lanes' sums add up as they are.
#pragma once
#include "platform.cuh"

namespace megatron_rlvr {

// A lane's part of its warp's sums. All lanes have the same maximum, and one alone, the owner, leaves its e^0 out.
struct LaneSums {
  RowSums<float> sums;
  bool is_owner = false;
};

// The largest value over a warp, none of them NaN: as unsigned integers in the same order, which have an instruction.
__device__ __forceinline__ float warp_maximum(float value) {
  const unsigned bits = __float_as_uint(value);
  const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  const unsigned largest = __reduce_max_sync(kWholeWarp, ordered);
  return __uint_as_float(largest & 0x80000000u ? largest & 0x7fffffffu : ~largest);
}

// A tile's logits enter the sums. They are summed among themselves first, in a few independent chains: fewer dependent
// instructions in a row, and rounding errors that grow with the number of tiles instead of the number of logits.
// kLeavesOutMaximum: the owner's tile may hold the maximum, whose e^0 must not be added to be subtracted again.
template <bool kSecondMoments, bool kLeavesOutMaximum, int kCount>
__device__ __forceinline__ void add_tile(LaneSums& lane, const float (&logits)[kCount], float inverse_temperature) {
  constexpr int chains = kCount < 4 ? kCount : 4;
  const float shift = shift_of(lane.sums.maximum);
  const float scale = inverse_temperature * kLog2OfE;  // sums over y = x log2(e), since 2^y is what the hardware has
  float exponential[chains] = {}, exponential_y[chains] = {}, squared[chains] = {}, squared_y[chains] = {};
  int at_maximum = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int chain = i % chains;
    const float y = (logits[i] - shift) * scale;
    float e = fast_exp2(y);
    if (kLeavesOutMaximum && logits[i] == lane.sums.maximum) {
      e = 0.0f;
      at_maximum += 1;
    }
    const float e_y = e * clamped_exponent(y);
    exponential[chain] += e;
    exponential_y[chain] += e_y;
    if (kSecondMoments) {
      squared[chain] += e * e;
      squared_y[chain] += e * e_y;
    }
  }
#pragma unroll
  for (int chain = 1; chain < chains; ++chain) {
    exponential[0] += exponential[chain];
    exponential_y[0] += exponential_y[chain];
    squared[0] += squared[chain];
    squared_y[0] += squared_y[chain];
  }
  const float repeats = kLeavesOutMaximum ? float(at_maximum - int(lane.is_owner)) : 0.0f;
  lane.sums.excess += exponential[0] + repeats;
  lane.sums.exponential_x += exponential_y[0] * kLn2;
  if (kSecondMoments) {
    lane.sums.squared_excess += squared[0] + repeats;
    lane.sums.squared_x += squared_y[0] * kLn2;
  }
}

// Every lane of the warp calls it, those without logits of their own with -inf, which adds nothing.
template <bool kSecondMoments, int kCount>
__device__ __forceinline__ void accumulate(LaneSums& lane, const float (&logits)[kCount], float inverse_temperature) {
  float own_maximum = logits[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) own_maximum = fmaxf(own_maximum, logits[i]);
  own_maximum = fmaxf(own_maximum, -INFINITY);  // nothing but NaN: e^NaN reports it, and no maximum may be NaN
  const float maximum = warp_maximum(own_maximum);
  if (maximum > lane.sums.maximum) {  // all lanes or none
    raise_maximum<kSecondMoments>(lane.sums, maximum, inverse_temperature, lane.is_owner ? 1.0f : 0.0f);
    const unsigned holders = __ballot_sync(kWholeWarp, own_maximum == maximum);
    lane.is_owner = int(threadIdx.x) % kWarpSize == __ffs(int(holders)) - 1;
    add_tile<kSecondMoments, true>(lane, logits, inverse_temperature);
  } else {
    add_tile<kSecondMoments, false>(lane, logits, inverse_temperature);
  }
}

}  // namespace megatron_rlvr
