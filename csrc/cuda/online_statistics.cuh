// One pass over logits: a warp adds tile after tile to its running sums.
//
// The lanes of a warp share one running maximum. It rises in few tiles (1 + 1/2 + 1/3 + ... of them for logits in
// random order), and only those tiles cost more than one exponential and two additions per logit. Because the maximum
// is shared, the lanes' sums can be added at the end without rescaling.
#pragma once
#include "platform.cuh"

namespace megatron_rlvr {

// The sums of one lane. All lanes of a warp have the same maximum, and one of them, the owner, leaves its e^0 out.
struct LaneSums {
  RowSums<float> sums;
  bool is_owner = false;
};

// The largest value over a warp; none may be NaN. There is an instruction for unsigned integers, so the values are
// mapped to integers of the same order.
__device__ __forceinline__ float warp_maximum(float value) {
  const unsigned bits = __float_as_uint(value);
  const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  const unsigned largest = __reduce_max_sync(kWholeWarp, ordered);
  return __uint_as_float(largest & 0x80000000u ? largest & 0x7fffffffu : ~largest);
}

// Adds a tile's logits to the sums. The tile is summed by itself first, in a few independent chains: fewer
// instructions then depend on each other, and rounding errors grow with the number of tiles instead of the number of
// logits. kLeavesOutMaximum: the tile may hold the maximum, whose e^0 stays out of the sums. Adding and subtracting
// it would lose the digits of a small excess.
template <bool kSecondMoments, bool kLeavesOutMaximum, int kCount>
__device__ __forceinline__ void add_tile(LaneSums& lane, const float (&logits)[kCount], float inverse_temperature) {
  constexpr int chains = kCount < 4 ? kCount : 4;
  const float shift = shift_of(lane.sums.maximum);
  const float scale = inverse_temperature * kLog2OfE;  // sums over y = x log2(e), because the hardware computes 2^y
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

// Every lane of the warp must call it. Lanes without logits pass -inf, which adds nothing.
template <bool kSecondMoments, int kCount>
__device__ __forceinline__ void accumulate(LaneSums& lane, const float (&logits)[kCount], float inverse_temperature) {
  float own_maximum = logits[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) own_maximum = fmaxf(own_maximum, logits[i]);
  own_maximum = fmaxf(own_maximum, -INFINITY);  // NaN alone: no maximum may be NaN, and e^NaN reports it
  const float maximum = warp_maximum(own_maximum);
  if (maximum > lane.sums.maximum) {  // true for all lanes or for none
    raise_maximum<kSecondMoments>(lane.sums, maximum, inverse_temperature, lane.is_owner ? 1.0f : 0.0f);
    const unsigned holders = __ballot_sync(kWholeWarp, own_maximum == maximum);
    lane.is_owner = int(threadIdx.x) % kWarpSize == __ffs(int(holders)) - 1;
    add_tile<kSecondMoments, true>(lane, logits, inverse_temperature);
  } else {
    add_tile<kSecondMoments, false>(lane, logits, inverse_temperature);
  }
}

}  // namespace megatron_rlvr
