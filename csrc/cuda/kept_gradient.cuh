// Kernel 3 under kept sets: reads the kept logits alone and writes the whole row, in place on request. Where few logits are
// kept, that is one write per logit.
#pragma once
#include "kept_statistics.cuh"
#include "logits_gradient.cuh"

namespace megatron_rlvr {

constexpr int64_t kKeptSlice = int64_t(1) << kKeptSliceBits;
constexpr int kKeptWords = int(kKeptSlice / 32);

// Bits [first, first + count) of a slice's bitmap, count <= 32.
__device__ __forceinline__ unsigned bits_of(const unsigned* bitmap, int first, int count) {
  const int word = first / 32, shift = first % 32;
  unsigned bits = bitmap[word] >> shift;
  if (shift + count > 32) bits |= bitmap[word + 1] << (32 - shift);
  return count < 32 ? bits & ((1u << count) - 1u) : bits;
}

// Zeros to the columns [begin, end) that are not in `bitmap`, whose bit 0 is column `begin`.
template <class Logit>
__device__ __forceinline__ void write_zeros_between(Logit* out, int64_t begin, int64_t end, const unsigned* bitmap) {
  using Bits = typename LogitFormat<Logit>::Bits;
  constexpr int per_vector = LogitFormat<Logit>::kPerVector;
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  const VectorSpan span = vector_span<Logit>(out, begin, end);
  uint4* vectors = reinterpret_cast<uint4*>(out + span.vector_begin());
  for (int i = thread; i < span.vectors; i += threads) {
    const int first = span.head + i * per_vector;
    const unsigned kept = bits_of(bitmap, first, per_vector);
    if (kept == 0) {
      store(vectors + i, make_uint4(0, 0, 0, 0));
    } else {
#pragma unroll
      for (int j = 0; j < per_vector; ++j) {
        if (!(kept >> j & 1u)) store(element_address(out, begin + first + j), Bits(0));
      }
    }
  }
  for (int i = thread; i < span.head + span.tail; i += threads) {  // single elements at both ends
    const int column = i < span.head ? i : int(span.tail_begin - begin) + i - span.head;
    if (!bits_of(bitmap, column, 1)) store(element_address(out, begin + column), Bits(0));
  }
}

// Grid: rows * slices blocks. One thread reads and then writes each kept logit, and no other thread touches it, so `out`
// may be `logits`.
template <class Logit>
__global__ void __launch_bounds__(kKeptGradientThreads)
    kept_gradient_kernel(KeptLogitsGradientArguments arguments, int64_t slices) {
  using Format = LogitFormat<Logit>;
  const LogitsGradientArguments& a = arguments.row;
  const KeptSets& kept = arguments.kept;
  const int64_t row = int64_t(blockIdx.x) / slices, slice = int64_t(blockIdx.x) % slices;
  const int64_t begin = slice * kKeptSlice;
  const int64_t end = begin + kKeptSlice < a.vocabulary ? begin + kKeptSlice : a.vocabulary;
  const int thread = int(threadIdx.x);
  const Logit* logits = static_cast<const Logit*>(a.logits) + row * a.row_stride;
  Logit* out = static_cast<Logit*>(a.gradient) + row * a.gradient_row_stride;

  __shared__ RowGradient shared_gradient;
  __shared__ KeptRange shared_range;
  __shared__ unsigned bitmap[kKeptWords];
  if (thread == 0) shared_gradient = row_gradient(a, row);
  if (thread == kWarpSize) {
    shared_range = kept_between(kept, row, a.vocabulary_start + begin, a.vocabulary_start + end, LoadReadOnly());
  }
  for (int i = thread; i < kKeptWords; i += kKeptGradientThreads) bitmap[i] = 0;
  __syncthreads();
  const RowGradient gradient = shared_gradient;
  const KeptRange range = shared_range;
  if (gradient.is_zero || range.begin == range.end) {
    write_zeros(out, begin, end);
    return;
  }
  for (int64_t i = range.begin + thread; i < range.end; i += kKeptGradientThreads) {
    const int64_t in_slice = column_of(load_read_only(kept.ids + i), a.vocabulary_start + begin, end - begin);
    if (in_slice < 0) continue;
    const int64_t column = begin + in_slice;
    const float logit = Format::decode(load_coherent(element_address(logits, column)));
    const float value = column == gradient.target_column ? gradient.at_target : gradient.at(logit);
    store(element_address(out, column), Format::encode(value));
    atomicOr(bitmap + in_slice / 32, 1u << (in_slice % 32));
  }
  __syncthreads();
  write_zeros_between(out, begin, end, bitmap);
}

template <class Logit>
void launch_kept_gradient(const KeptLogitsGradientArguments& a) {
  const int64_t slices = (a.row.vocabulary + kKeptSlice - 1) / kKeptSlice;
  MEGATRON_RLVR_LAUNCH((kept_gradient_kernel<Logit>), a.row.rows * slices, kKeptGradientThreads, a.row.stream, a, slices);
}

}  // namespace megatron_rlvr
