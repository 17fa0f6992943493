// The kernels that read every logit, written once in terms of `Vector`. One source file per instruction set defines a
// `Vector` and includes this file.
//
// Everything has internal linkage, the formulas included. An ordinary inline function or template compiled for AVX-512 may
// become the one copy that the linker keeps, and would then run in the baseline kernels of a processor without AVX-512.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"  // with kernel_arguments.h, whose types must not be those of the namespace below
#include "number_types.h"

namespace megatron_rlvr::cpu {
namespace {
namespace isolated {
#include "../formulas.h"
}
namespace formulas = isolated::megatron_rlvr;

// Logits of a block. Small enough to stay in the first-level cache between the pass for the maximum and that for the
// sums.
constexpr int64_t kBlock = 4096;
// A lane adds at most 16 numbers before the lanes are summed in double. Rounding then stays at 1e-7 for rows of any
// length, even where equal logits make every addition round the same way.
constexpr int64_t kUnroll = 4;
constexpr int64_t kChunk = 16 * kUnroll * Vector::kLanes;

template <class T>
Vector::Floats load_tail(const T* p, int64_t count) {  // missing lanes are -inf and add nothing
  T buffer[Vector::kLanes];
  for (int i = 0; i < Vector::kLanes; i++) assign(buffer[i], -INFINITY);
  memcpy(buffer, p, size_t(count) * sizeof(T));
  return Vector::load(buffer);
}

template <class T>
float block_maximum(const T* p, int64_t count) {
  Vector::Floats best[kUnroll];
  for (auto& v : best) v = Vector::set(-INFINITY);
  int64_t i = 0;
  for (; i + kUnroll * Vector::kLanes <= count; i += kUnroll * Vector::kLanes)
    for (int k = 0; k < kUnroll; k++) best[k] = Vector::maximum(best[k], Vector::load(p + i + k * Vector::kLanes));
  for (; i + Vector::kLanes <= count; i += Vector::kLanes) best[0] = Vector::maximum(best[0], Vector::load(p + i));
  if (i < count) best[0] = Vector::maximum(best[0], load_tail(p + i, count - i));
  return Vector::largest(Vector::maximum(Vector::maximum(best[0], best[1]), Vector::maximum(best[2], best[3])));
}

// Sums per lane of e^x and x e^x and, for the second moments, of e^2x and x e^2x.
template <bool kMoments>
struct LaneSums {
  Vector::Floats exponential[kUnroll], exponential_x[kUnroll], squared[kUnroll], squared_x[kUnroll];

  void clear() {
    for (int k = 0; k < kUnroll; k++) {
      exponential[k] = exponential_x[k] = Vector::set(0.0f);
      if (kMoments) squared[k] = squared_x[k] = Vector::set(0.0f);
    }
  }
  static double total(const Vector::Floats* v) {
    return Vector::sum(Vector::add(Vector::add(v[0], v[1]), Vector::add(v[2], v[3])));
  }
  void flush_into(formulas::RowSums<double>& sums) {
    sums.excess += total(exponential);
    sums.exponential_x += total(exponential_x);
    if (kMoments) {
      sums.squared_excess += total(squared);
      sums.squared_x += total(squared_x);
    }
    clear();
  }
};

// Adds a block to sums whose maximum is at least the block's. If the block holds that maximum (kHoldsMaximum), its
// e^0 stays out of the sums: all logits equal to it are skipped and counted, and all but one of them are added
// afterwards.
template <bool kMoments, bool kHoldsMaximum, class T>
void add_block(const T* p, int64_t count, float inverse_temperature, formulas::RowSums<double>& sums) {
  using Floats = Vector::Floats;
  const Floats shift = Vector::set(formulas::shift_of(float(sums.maximum))), scale = Vector::set(inverse_temperature);
  LaneSums<kMoments> lanes;
  lanes.clear();
  int64_t equal = 0;
  const auto push = [&](Floats z, int k) {
    const Floats x = Vector::multiply(Vector::subtract(z, shift), scale);
    Vector::Mask live;
    const Floats e = Vector::exponential(x, live);
    Vector::Mask added = live;
    if (kHoldsMaximum) {
      added = Vector::not_zero(x, live);
      equal += Vector::count_zeros(x);
    }
    lanes.exponential[k] = Vector::add_where(added, lanes.exponential[k], e);
    lanes.exponential_x[k] = Vector::multiply_add_where(live, x, e, lanes.exponential_x[k]);
    if (kMoments) {
      const Floats squared = Vector::multiply(e, e);
      lanes.squared[k] = Vector::add_where(added, lanes.squared[k], squared);
      lanes.squared_x[k] = Vector::multiply_add_where(live, x, squared, lanes.squared_x[k]);
    }
  };
  int64_t i = 0;
  for (; i + kChunk <= count; i += kChunk) {
    for (int64_t j = i; j < i + kChunk; j += kUnroll * Vector::kLanes)
      for (int k = 0; k < kUnroll; k++) push(Vector::load(p + j + k * Vector::kLanes), k);
    lanes.flush_into(sums);
  }
  for (int k = 0; i + Vector::kLanes <= count; i += Vector::kLanes, k = (k + 1) % kUnroll) push(Vector::load(p + i), k);
  if (i < count) push(load_tail(p + i, count - i), 0);
  lanes.flush_into(sums);
  if (kHoldsMaximum) {
    sums.excess += double(equal - 1);
    sums.squared_excess += double(equal - 1);
  }
}

// Adds a block to the sums, whatever their maximum is.
template <bool kMoments, class T>
void add_logits(const T* p, int64_t count, float inverse_temperature, formulas::RowSums<double>& sums) {
  const float largest = block_maximum(p, count);
  if (largest > sums.maximum) {
    formulas::raise_maximum<kMoments>(sums, double(largest), double(inverse_temperature));
    add_block<kMoments, true>(p, count, inverse_temperature, sums);
  } else {
    add_block<kMoments, false>(p, count, inverse_temperature, sums);
  }
}

template <bool kMoments>
void store_partial(float* partial, const formulas::RowSums<double>& sums, float target_logit) {
  partial[kMaximum] = float(sums.maximum);
  partial[kExcess] = float(sums.excess);
  partial[kExponentialX] = float(sums.exponential_x);
  partial[kTargetLogit] = target_logit;
  if (kMoments) {
    partial[kSquaredExcess] = float(sums.squared_excess);
    partial[kSquaredX] = float(sums.squared_x);
  }
}

// The column of a row's target in this shard, or -1.
template <class Arguments>
int64_t target_column(const Arguments& a, int64_t row) {
  const int64_t column = a.targets[row] - a.vocabulary_start;
  return a.targets[row] >= 0 && column >= 0 && column < a.vocabulary ? column : -1;
}

template <bool kMoments, class T>
void row_statistics_of(const RowStatisticsArguments& a, int64_t begin, int64_t end) {
  constexpr int64_t width = kMoments ? kPartialWidthWithMoments : kPartialWidth;
  const float inverse_temperature = float(a.inverse_temperature);
  for (int64_t row = begin; row < end; row++) {
    const T* p = static_cast<const T*>(a.logits) + row * a.row_stride;
    formulas::RowSums<double> sums;
    for (int64_t start = 0; start < a.vocabulary; start += kBlock)
      add_logits<kMoments>(p + start, a.vocabulary - start < kBlock ? a.vocabulary - start : kBlock, inverse_temperature,
                           sums);
    const int64_t column = target_column(a, row);
    store_partial<kMoments>(a.partials + row * width, sums, column >= 0 ? to_float(p[column]) : -INFINITY);
  }
}

// What the logits of a row share in their gradients.
struct RowGradient {
  bool is_zero;  // no gradient flows into this row, and nothing below is set
  Vector::Floats constant, linear, shift, scale;
  float at_target;

  RowGradient(const LogitsGradientArguments& a, int64_t row) {
    const float g = a.gradient_logprob && a.targets[row] >= 0 ? a.gradient_logprob[row] : 0.0f;
    const float h = a.gradient_entropy ? a.gradient_entropy[row] : 0.0f;
    is_zero = g == 0.0f && h == 0.0f;
    if (is_zero) return;
    const float inverse_temperature = float(a.inverse_temperature);
    const float* state = a.state + row * kStateWidth;
    const float log_sum = state[kStateLogSum], entropy = state[kStateEntropy];
    const auto line = formulas::logit_gradient(g, h, log_sum, entropy, inverse_temperature);
    // p = e^x / S. Scaling both coefficients by 1 / S leaves one exponential and one line per logit.
    const double weight = exp(-double(log_sum));
    constant = Vector::set(float(line.constant * weight));
    linear = Vector::set(float(line.linear * weight));
    shift = Vector::set(state[kStateMaximum]);
    scale = Vector::set(inverse_temperature);
    at_target = formulas::gradient_at_target(g, h, state[kStateLogprob], entropy, inverse_temperature);
  }

  Vector::Floats at(Vector::Floats z) const {
    const Vector::Floats x = Vector::multiply(Vector::subtract(z, shift), scale);
    return Vector::times_exponential(Vector::multiply_add(linear, x, constant), x);
  }
};

// The gradients of `count` logits; `out` may be `p`.
template <class T>
void write_gradients(const RowGradient& gradient, const T* p, T* out, int64_t count) {
  int64_t i = 0;
  for (; i + kUnroll * Vector::kLanes <= count; i += kUnroll * Vector::kLanes)
    for (int k = 0; k < kUnroll; k++)
      Vector::store(out + i + k * Vector::kLanes, gradient.at(Vector::load(p + i + k * Vector::kLanes)));
  for (; i + Vector::kLanes <= count; i += Vector::kLanes) Vector::store(out + i, gradient.at(Vector::load(p + i)));
  if (i < count) {
    T buffer[Vector::kLanes];
    Vector::store(buffer, gradient.at(load_tail(p + i, count - i)));
    memcpy(out + i, buffer, size_t(count - i) * sizeof(T));
  }
}

// Calls `write(row, gradient, p, out)` for each row from `begin` to `end` whose gradient is not zero everywhere, with
// its logits and the place of its gradient. Writes the zeros of the others.
template <class T, class F>
void with_row_gradients(const LogitsGradientArguments& a, int64_t begin, int64_t end, const F& write) {
  for (int64_t row = begin; row < end; row++) {
    const T* p = static_cast<const T*>(a.logits) + row * a.row_stride;
    T* out = static_cast<T*>(a.gradient) + row * a.gradient_row_stride;
    const RowGradient gradient(a, row);
    if (gradient.is_zero)
      memset(out, 0, size_t(a.vocabulary) * sizeof(T));
    else
      write(row, gradient, p, out);
  }
}

template <class T>
void logits_gradient_of(const LogitsGradientArguments& a, int64_t begin, int64_t end) {
  with_row_gradients<T>(a, begin, end, [&](int64_t row, const RowGradient& gradient, const T* p, T* out) {
    write_gradients(gradient, p, out, a.vocabulary);
    const int64_t column = target_column(a, row);
    if (column >= 0) assign(out[column], gradient.at_target);
  });
}

// Calls `run` with a value of the type that the logits have.
template <class F>
void with_logits_type(int32_t type, const F& run) {
  if (type == kFloat32) run(0.0f);
  if (type == kBFloat16) run(BFloat16{});
  if (type == kFloat16) run(Float16{});
}

void row_statistics(const RowStatisticsArguments& a, int64_t begin, int64_t end) {
  with_logits_type(a.logits_type, [&](auto zero) {
    using T = decltype(zero);
    if (a.second_moments)
      row_statistics_of<true, T>(a, begin, end);
    else
      row_statistics_of<false, T>(a, begin, end);
  });
}

void logits_gradient(const LogitsGradientArguments& a, int64_t begin, int64_t end) {
  with_logits_type(a.logits_type, [&](auto zero) { logits_gradient_of<decltype(zero)>(a, begin, end); });
}

}  // namespace
}  // namespace megatron_rlvr::cpu
