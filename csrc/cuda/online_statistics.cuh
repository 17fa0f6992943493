// One pass over logits: a tile of them enters the running sums of a thread.
#pragma once
#include "platform.cuh"

namespace megatron_rlvr {

// kCount logits enter the sums. They are summed among themselves first, in a few independent chains: shorter dependency
// chains for the hardware, and rounding errors that grow with the number of tiles instead of the number of logits.
template <bool kSecondMoments, int kCount>
__device__ __forceinline__ void accumulate(RowSums<float>& sums, const float (&logits)[kCount],
                                           float inverse_temperature) {
  constexpr int chains = kCount < 4 ? kCount : 4;

  float tile_maximum = logits[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) tile_maximum = fmaxf(tile_maximum, logits[i]);  // ignores NaN; e^NaN reports it
  const bool leads = tile_maximum > sums.maximum;
  if (leads) raise_maximum<kSecondMoments>(sums, tile_maximum, inverse_temperature);

  const float shift = shift_of(sums.maximum);
  float exponential[chains] = {}, exponential_x[chains] = {}, squared[chains] = {}, squared_x[chains] = {};
  int at_maximum = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int chain = i % chains;
    const float x = (logits[i] - shift) * inverse_temperature;
    const bool is_maximum = logits[i] == sums.maximum;
    const float e = is_maximum ? 0.0f : __expf(x);  // e^0 of the maximum is counted apart: see RowSums on excess
    const float e_x = e * clamped_exponent(x);
    at_maximum += is_maximum;
    exponential[chain] += e;
    exponential_x[chain] += e_x;
    if (kSecondMoments) {
      squared[chain] += e * e;
      squared_x[chain] += e * e_x;
    }
  }
#pragma unroll
  for (int chain = 1; chain < chains; ++chain) {
    exponential[0] += exponential[chain];
    exponential_x[0] += exponential_x[chain];
    squared[0] += squared[chain];
    squared_x[0] += squared_x[chain];
  }
  const float repeats = float(at_maximum - int(leads));  // the first e^0 of the maximum stays out
  sums.excess += exponential[0] + repeats;
  sums.exponential_x += exponential_x[0];
  if (kSecondMoments) {
    sums.squared_excess += squared[0] + repeats;
    sums.squared_x += squared_x[0];
  }
}

}  // namespace megatron_rlvr
