// Access to global memory: 16 bytes at a time where a row allows it, single elements at its ends.
//
// Kernels use the load and store functions below and never dereference a pointer to global memory. The emulator counts
// bytes in these intrinsics, and tests compare the counts with the least traffic possible.
#pragma once
#include <cstdint>

#include "platform.cuh"

namespace megatron_rlvr {

// For memory that no thread of the kernel writes: goes through the read-only cache.
template <class Word>
__device__ __forceinline__ Word load_read_only(const Word* address) {
  return __ldg(address);
}

// For memory that the kernel may overwrite (the gradient over the logits), which must not take the read-only path.
template <class Word>
__device__ __forceinline__ Word load_coherent(const Word* address) {
  return __ldcg(address);
}

template <class Word>
__device__ __forceinline__ void store(Word* address, Word value) {
  __stwb(address, value);
}

// How logits of a type are read and written. `Bits` is one element as an integer, `kPerVector` elements fill the four
// 32-bit words of a 16-byte vector, and `kMinusInfinity` is a word in which every element is -inf.
template <class Logit>
struct LogitFormat;

template <>
struct LogitFormat<float> {
  using Bits = unsigned int;
  static constexpr int kPerVector = 4;
  static constexpr unsigned kMinusInfinity = 0xff800000u;
  static __device__ __forceinline__ float decode(Bits bits) { return __uint_as_float(bits); }
  static __device__ __forceinline__ Bits encode(float value) { return __float_as_uint(value); }
  static __device__ __forceinline__ void decode_word(unsigned word, float* out) { out[0] = __uint_as_float(word); }
  static __device__ __forceinline__ unsigned encode_word(const float* in) { return __float_as_uint(in[0]); }
};

template <>
struct LogitFormat<__nv_bfloat16> {
  using Bits = unsigned short;
  static constexpr int kPerVector = 8;
  static constexpr unsigned kMinusInfinity = 0xff80ff80u;
  static __device__ __forceinline__ float decode(Bits bits) { return __uint_as_float(unsigned(bits) << 16); }
  static __device__ __forceinline__ Bits encode(float value) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  }
  static __device__ __forceinline__ void decode_word(unsigned word, float* out) {
    out[0] = __uint_as_float(word << 16);
    out[1] = __uint_as_float(word & 0xffff0000u);
  }
  static __device__ __forceinline__ unsigned encode_word(const float* in) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(in[0], in[1]);  // both in one instruction
    return unsigned(__bfloat16_as_ushort(pair.x)) | unsigned(__bfloat16_as_ushort(pair.y)) << 16;
  }
};

template <>
struct LogitFormat<__half> {
  using Bits = unsigned short;
  static constexpr int kPerVector = 8;
  static constexpr unsigned kMinusInfinity = 0xfc00fc00u;
  static __device__ __forceinline__ float decode(Bits bits) { return __half2float(__ushort_as_half(bits)); }
  static __device__ __forceinline__ Bits encode(float value) { return __half_as_ushort(__float2half_rn(value)); }
  static __device__ __forceinline__ void decode_word(unsigned word, float* out) {
    out[0] = decode(Bits(word & 0xffffu));
    out[1] = decode(Bits(word >> 16));
  }
  static __device__ __forceinline__ unsigned encode_word(const float* in) {
    const __half2 pair = __floats2half2_rn(in[0], in[1]);
    return unsigned(__half_as_ushort(pair.x)) | unsigned(__half_as_ushort(pair.y)) << 16;
  }
};

template <class Logit>
__device__ __forceinline__ void decode_vector(uint4 vector, float* out) {
  using Format = LogitFormat<Logit>;
  constexpr int per_word = Format::kPerVector / 4;
  Format::decode_word(vector.x, out);
  Format::decode_word(vector.y, out + per_word);
  Format::decode_word(vector.z, out + 2 * per_word);
  Format::decode_word(vector.w, out + 3 * per_word);
}

template <class Logit>
__device__ __forceinline__ uint4 encode_vector(const float* in) {
  using Format = LogitFormat<Logit>;
  constexpr int per_word = Format::kPerVector / 4;
  uint4 vector;
  vector.x = Format::encode_word(in);
  vector.y = Format::encode_word(in + per_word);
  vector.z = Format::encode_word(in + 2 * per_word);
  vector.w = Format::encode_word(in + 3 * per_word);
  return vector;
}

template <class Logit>
__device__ __forceinline__ const typename LogitFormat<Logit>::Bits* element_address(const Logit* row, int64_t column) {
  return reinterpret_cast<const typename LogitFormat<Logit>::Bits*>(row + column);
}

template <class Logit>
__device__ __forceinline__ typename LogitFormat<Logit>::Bits* element_address(Logit* row, int64_t column) {
  return reinterpret_cast<typename LogitFormat<Logit>::Bits*>(row + column);
}

__device__ __forceinline__ bool same_alignment(const void* a, const void* b) {
  return ((reinterpret_cast<uintptr_t>(a) ^ reinterpret_cast<uintptr_t>(b)) & 15u) == 0;
}

// Columns [begin, end) of a row as a head of single elements up to the first 16-byte boundary, whole vectors, and a
// tail. A row may start at any element, so head and tail have up to kPerVector - 1 elements each.
struct VectorSpan {
  int64_t begin;
  int head;          // elements [begin, begin + head)
  int vectors;       // from vector_begin()
  int tail;          // elements [tail_begin, tail_begin + tail)
  int64_t tail_begin;

  __device__ __forceinline__ int64_t vector_begin() const { return begin + head; }
};

template <class Logit>
__device__ __forceinline__ VectorSpan vector_span(const Logit* row, int64_t begin, int64_t end) {
  constexpr int per_vector = LogitFormat<Logit>::kPerVector;
  const unsigned misalignment = unsigned(reinterpret_cast<uintptr_t>(row + begin) & 15u);
  const int to_boundary = int((16u - misalignment) & 15u) / int(sizeof(Logit));
  VectorSpan span;
  span.begin = begin;
  span.head = to_boundary < end - begin ? to_boundary : int(end - begin);
  span.vectors = int((end - begin - span.head) / per_vector);
  span.tail_begin = begin + span.head + int64_t(span.vectors) * per_vector;
  span.tail = int(end - span.tail_begin);
  return span;
}

}  // namespace megatron_rlvr
