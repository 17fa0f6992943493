// Kernel 3: the gradient of log-prob and entropy with respect to every logit of a shard, recomputed from the logits.
// One read and one write per logit, in place on request.
#pragma once
#include "heuristics.h"
#include "launchers.h"
#include "memory.cuh"

namespace megatron_rlvr {

// What the threads of a row share. The gradient with respect to a logit is p (constant + linear x). Here both
// coefficients contain the 1/S of p = e^x / S, and x is replaced by y = x log2(e). That takes one 2^y and six more
// instructions per logit.
struct RowGradient {
  float maximum;
  float scale;  // y = (z - maximum) scale
  LogitGradient gradient;
  int64_t target_column;  // among this shard's columns, -1 if the target is in another shard
  float at_target;
  bool is_zero;  // no gradient flows into this row

  __device__ __forceinline__ float at(float logit) const {
    const float y = (logit - maximum) * scale;
    return gradient_at(gradient, fast_exp2(y), y);
  }
};

template <class Logit>
__device__ __forceinline__ void write_element(const Logit* logits, Logit* out, int64_t column, const RowGradient& row) {
  using Format = LogitFormat<Logit>;
  const float logit = Format::decode(load_coherent(element_address(logits, column)));
  const float value = column == row.target_column ? row.at_target : row.at(logit);
  store(element_address(out, column), Format::encode(value));
}

// Writes the gradient of columns [begin, end) of a row, spread over the threads of the block. One thread reads and then
// writes each element, so `out` may be `logits`.
template <class Logit>
__device__ __forceinline__ void write_gradient(const Logit* logits, Logit* out, int64_t begin, int64_t end,
                                               const RowGradient& row) {
  using Format = LogitFormat<Logit>;
  constexpr int per_vector = Format::kPerVector;
  constexpr int vectors_per_tile = kLogitsPerTile / per_vector;
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  const VectorSpan span = vector_span(logits, begin, end);
  const uint4* vectors = reinterpret_cast<const uint4*>(logits + span.vector_begin());
  uint4* out_vectors = reinterpret_cast<uint4*>(out + span.vector_begin());
  // False if `out` is a view with another alignment, which is then written element by element.
  const bool vector_stores = same_alignment(logits, out);

  for (int first = thread; first < span.vectors; first += threads * vectors_per_tile) {
    uint4 words[vectors_per_tile];
#pragma unroll
    for (int i = 0; i < vectors_per_tile; ++i) {
      const int index = first + i * threads;
      words[i] = index < span.vectors ? load_coherent(vectors + index) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < vectors_per_tile; ++i) {
      const int index = first + i * threads;
      if (index >= span.vectors) break;
      float values[per_vector];
      decode_vector<Logit>(words[i], values);
#pragma unroll
      for (int j = 0; j < per_vector; ++j) values[j] = row.at(values[j]);
      const int64_t column = span.vector_begin() + int64_t(index) * per_vector;
      if (row.target_column >= column && row.target_column < column + per_vector) {
#pragma unroll
        for (int j = 0; j < per_vector; ++j) {  // no dynamic index: it would move the array to local memory
          if (column + j == row.target_column) values[j] = row.at_target;
        }
      }
      if (vector_stores) {
        store(out_vectors + index, encode_vector<Logit>(values));
      } else {
#pragma unroll
        for (int j = 0; j < per_vector; ++j) store(element_address(out, column + j), Format::encode(values[j]));
      }
    }
  }
  for (int i = thread; i < span.head; i += threads) write_element(logits, out, span.begin + i, row);
  for (int i = thread; i < span.tail; i += threads) write_element(logits, out, span.tail_begin + i, row);
}

// Writes zeros to columns [begin, end). The logits of a row without gradient (padding, prompt) are not read.
template <class Logit>
__device__ __forceinline__ void write_zeros(Logit* out, int64_t begin, int64_t end) {
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  const VectorSpan span = vector_span<Logit>(out, begin, end);
  uint4* vectors = reinterpret_cast<uint4*>(out + span.vector_begin());
  for (int i = thread; i < span.vectors; i += threads) store(vectors + i, make_uint4(0, 0, 0, 0));
  for (int i = thread; i < span.head; i += threads) {
    store(element_address(out, span.begin + i), typename LogitFormat<Logit>::Bits(0));
  }
  for (int i = thread; i < span.tail; i += threads) {
    store(element_address(out, span.tail_begin + i), typename LogitFormat<Logit>::Bits(0));
  }
}

__device__ __forceinline__ RowGradient row_gradient(const LogitsGradientArguments& a, int64_t row) {
  const int64_t target = load_read_only(reinterpret_cast<const long long*>(a.targets) + row);
  const bool has_logprob = a.gradient_logprob != nullptr && target >= 0;
  const float g = has_logprob ? load_read_only(a.gradient_logprob + row) : 0.0f;
  const float h = a.gradient_entropy != nullptr ? load_read_only(a.gradient_entropy + row) : 0.0f;
  const float4 state = load_read_only(reinterpret_cast<const float4*>(a.state) + row);  // maximum, log sum, H, log-prob
  const int64_t column = target - a.vocabulary_start;
  const float inverse_temperature = float(a.inverse_temperature);
  RowGradient out;
  out.maximum = state.x;
  out.scale = inverse_temperature * kLog2OfE;
  out.gradient = logit_gradient(g, h, state.y, state.z, inverse_temperature);
  const float one_over_sum = expf(-state.y);
  out.gradient.constant *= one_over_sum;
  out.gradient.linear *= one_over_sum * kLn2;
  out.target_column = target >= 0 && column >= 0 && column < a.vocabulary ? column : -1;
  out.at_target = gradient_at_target(g, h, state.w, state.z, inverse_temperature);
  out.is_zero = g == 0.0f && h == 0.0f;
  return out;
}

// Grid: rows * slices blocks.
template <class Logit>
__global__ void __launch_bounds__(kMaximumThreads) logits_gradient_kernel(LogitsGradientArguments a, RowLaunch launch) {
  const int64_t row = int64_t(blockIdx.x) / launch.slices, slice = int64_t(blockIdx.x) % launch.slices;
  const int64_t begin = slice * launch.slice_width;
  const int64_t end = begin + launch.slice_width < a.vocabulary ? begin + launch.slice_width : a.vocabulary;
  const Logit* logits = static_cast<const Logit*>(a.logits) + row * a.row_stride;
  Logit* out = static_cast<Logit*>(a.gradient) + row * a.gradient_row_stride;

  __shared__ RowGradient shared_gradient;
  if (threadIdx.x == 0) shared_gradient = row_gradient(a, row);
  __syncthreads();
  const RowGradient gradient = shared_gradient;
  if (gradient.is_zero) {
    write_zeros(out, begin, end);
  } else {
    write_gradient(logits, out, begin, end, gradient);
  }
}

// Instantiated by logits_gradient_<type>.cu.
template <class Logit>
void launch_logits_gradient(const LogitsGradientArguments& a, const RowLaunch& launch) {
  MEGATRON_RLVR_LAUNCH((logits_gradient_kernel<Logit>), a.rows * launch.slices, launch.threads, a.stream, a, launch);
}

extern template void launch_logits_gradient<float>(const LogitsGradientArguments&, const RowLaunch&);
extern template void launch_logits_gradient<__nv_bfloat16>(const LogitsGradientArguments&, const RowLaunch&);
extern template void launch_logits_gradient<__half>(const LogitsGradientArguments&, const RowLaunch&);

}  // namespace megatron_rlvr
