// The kernels in one program without Python, for the sanitizers and for planted bugs: runs each kernel over awkward
// shapes in buffers of exactly the size they need, and compares with double precision.
//
//   driver [ORDER]   in this order of threads and blocks; prints a digest of all results, exit status 1 for a wrong one
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

#include "cuda/clipped_objective.cu"
#include "cuda/kept_gradient.cu"
#include "cuda/kept_statistics.cu"
#include "cuda/logits_gradient.cu"
#include "cuda/logits_gradient_bfloat16.cu"
#include "cuda/logits_gradient_float16.cu"
#include "cuda/logits_gradient_float32.cu"
#include "cuda/row_statistics.cu"
#include "cuda/row_statistics_bfloat16.cu"
#include "cuda/row_statistics_float16.cu"
#include "cuda/row_statistics_float32.cu"

namespace {

constexpr double kInverseTemperature = 1.25;
constexpr int kMultiprocessors = 4;

int failures = 0;
uint64_t digest = 1469598103934665603u;

void expect(bool holds, const char* what, const char* where, double found, double wanted) {
  if (holds) return;
  if (++failures <= 10) std::printf("check failed: %s in %s: %g instead of %g\n", what, where, found, wanted);
}

void expect_near(double found, double wanted, double tolerance, const char* what, const char* where) {
  expect(std::abs(found - wanted) <= tolerance, what, where, found, wanted);  // NaN is not near anything
}

template <class Value>
void add_to_digest(const Value* values, size_t count) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(values);
  for (size_t i = 0; i < count * sizeof(Value); ++i) digest = (digest ^ bytes[i]) * 1099511628211u;
}

template <class Value>
std::vector<Value> zeros(int64_t count) {
  return std::vector<Value>(size_t(count), Value());
}

uint32_t random_bits() {
  static uint64_t state = 42;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return uint32_t(state >> 33);
}
double uniform() { return random_bits() / 2147483648.0; }

float decoded(float value) { return value; }
float decoded(__nv_bfloat16 value) { return __uint_as_float(unsigned(value.bits) << 16); }
void encode(float& out, float value) { out = value; }
void encode(__nv_bfloat16& out, float value) { out = __float2bfloat16_rn(value); }
constexpr int type_of(float) { return kFloat32; }
constexpr int type_of(__nv_bfloat16) { return kBFloat16; }

struct Shape {
  const char* name;
  int64_t rows, vocabulary, stride, offset;  // the first row starts `offset` elements into the buffer
  int64_t shards;
  bool in_place;
};

// Row statistics of one row in double precision.
struct Exact {
  std::vector<double> log_probability;
  double entropy = 0, squared = 0, squared_logprob = 0;
};

Exact exact_row(const float* logits, int64_t vocabulary) {
  Exact exact;
  double maximum = -INFINITY, sum = 0;
  for (int64_t i = 0; i < vocabulary; ++i) maximum = std::max(maximum, double(logits[i]));
  for (int64_t i = 0; i < vocabulary; ++i) sum += std::exp((logits[i] - maximum) * kInverseTemperature);
  for (int64_t i = 0; i < vocabulary; ++i) {
    const double log_probability = (logits[i] - maximum) * kInverseTemperature - std::log(sum);
    const double probability = std::exp(log_probability);
    exact.log_probability.push_back(log_probability);
    if (probability == 0) continue;
    exact.entropy -= probability * log_probability;
    exact.squared += probability * probability;
    exact.squared_logprob += probability * probability * log_probability;
  }
  return exact;
}

template <class Logit>
void check_logits_kernels(const Shape& s) {
  const bool second_moments = true;
  const int64_t width = kPartialWidthWithMoments, shard_width = s.vocabulary / s.shards;
  const size_t elements = size_t(s.offset + (s.rows - 1) * s.stride + s.vocabulary);
  // of exactly this size, so that AddressSanitizer guards the ends
  std::unique_ptr<Logit[]> buffer(new Logit[elements]), copy(new Logit[elements]);
  Logit* logits = buffer.get() + s.offset;
  for (size_t i = 0; i < elements; ++i) encode(buffer[i], NAN);  // what lies between rows is poison
  auto values = zeros<std::vector<float>>(s.rows);
  auto targets = zeros<int64_t>(s.rows);
  for (int64_t row = 0; row < s.rows; ++row) {
    for (int64_t i = 0; i < s.vocabulary; ++i) {
      float value = float(8 * (uniform() + uniform() + uniform() - 1.5));
      if (row == 1 && i % 3 == 0) value = -INFINITY;
      if (row == 1 && i < shard_width && s.shards > 1) value = -INFINITY;  // nothing finite in the first shard
      encode(logits[row * s.stride + i], value);
      values[size_t(row)].push_back(decoded(logits[row * s.stride + i]));
    }
    targets[size_t(row)] = row % 3 == 2 ? kIgnoredTarget : row % 2 ? s.vocabulary - 1 : shard_width - 1;
  }
  targets[0] = s.vocabulary - 1;
  std::copy(buffer.get(), buffer.get() + elements, copy.get());

  std::vector<float> partials = zeros<float>(s.shards * s.rows * width);
  for (int64_t shard = 0; shard < s.shards; ++shard) {
    auto workspace = zeros<float>(
        megatron_rlvr_row_statistics_workspace(s.rows, shard_width, second_moments, kMultiprocessors));
    const RowStatisticsArguments arguments{
        logits + shard * shard_width, type_of(Logit{}), s.rows, shard_width, s.stride, targets.data(),
        shard * shard_width, kInverseTemperature, second_moments, partials.data() + shard * s.rows * width,
        workspace.data(), nullptr};
    megatron_rlvr_row_statistics(&arguments, kMultiprocessors);
  }
  const size_t rows = size_t(s.rows);
  auto logprob = zeros<float>(s.rows), entropies = zeros<float>(s.rows), moments = zeros<float>(2 * s.rows);
  auto g = zeros<float>(s.rows), h = zeros<float>(s.rows);
  auto state = zeros<float4>(s.rows);
  int32_t bad_rows[2] = {kNoBadRow, kNoBadRow};
  const CombineStatisticsArguments combine{
      partials.data(), s.shards, s.rows, second_moments, targets.data(), s.vocabulary, kInverseTemperature,
      logprob.data(), entropies.data(), &state[0].x, moments.data(), bad_rows, nullptr};
  megatron_rlvr_combine_statistics(&combine);
  for (size_t row = 0; row < rows; ++row) {
    g[row] = row == 3 ? 0.0f : float(uniform() - 0.5);
    h[row] = row == 3 ? 0.0f : float(uniform() - 0.5);
  }
  std::unique_ptr<Logit[]> separate(s.in_place ? nullptr : new Logit[size_t(s.rows * s.vocabulary)]);
  Logit* gradient = s.in_place ? logits : separate.get();
  const int64_t gradient_stride = s.in_place ? s.stride : s.vocabulary;
  for (int64_t shard = 0; shard < s.shards; ++shard) {
    const LogitsGradientArguments arguments{
        logits + shard * shard_width, gradient + shard * shard_width, type_of(Logit{}), s.rows, shard_width, s.stride,
        gradient_stride, targets.data(), shard * shard_width, kInverseTemperature, &state[0].x, g.data(), h.data(),
        nullptr};
    megatron_rlvr_logits_gradient(&arguments, kMultiprocessors);
  }

  expect(bad_rows[0] == kNoBadRow && bad_rows[1] == kNoBadRow, "no bad row", s.name, bad_rows[0], kNoBadRow);
  const double rounding = type_of(Logit{}) == kBFloat16 ? 1.0 / 256 : 1e-5;
  for (int64_t row = 0; row < s.rows; ++row) {
    const Exact exact = exact_row(values[size_t(row)].data(), s.vocabulary);
    const int64_t target = targets[size_t(row)];
    const double wanted = target < 0 ? 0 : exact.log_probability[size_t(target)];
    if (wanted > -INFINITY) {
      expect_near(logprob[size_t(row)], wanted, 2e-6 * std::max(1.0, -wanted), "log-prob", s.name);
    }
    expect_near(entropies[size_t(row)], exact.entropy, 1e-5, "entropy", s.name);
    expect_near(moments[size_t(row)], exact.squared, 1e-5 * exact.squared, "sum p^2", s.name);
    expect_near(moments[size_t(s.rows + row)], exact.squared_logprob, -1e-5 * exact.squared_logprob, "sum p^2 ln p",
                s.name);
    for (int64_t i = 0; i < s.vocabulary; ++i) {
      const double log_probability = exact.log_probability[size_t(i)], probability = std::exp(log_probability);
      const double g_row = target < 0 ? 0 : g[size_t(row)], h_row = h[size_t(row)];
      const double from_entropy = probability > 0 ? probability * (log_probability + exact.entropy) : 0;
      const double expected = kInverseTemperature * (g_row * ((i == target) - probability) - h_row * from_entropy);
      const double found = decoded(gradient[row * gradient_stride + i]);
      expect_near(found, expected, rounding * std::abs(expected) + 4e-6 * probability + 1e-38, "gradient", s.name);
    }
  }
  for (size_t i = 0; i < elements; ++i) {  // nothing outside the rows was written, nor anything if not in place
    const int64_t at = int64_t(i) - s.offset;
    const bool in_row = at >= 0 && at % s.stride < s.vocabulary;
    if (in_row && s.in_place) continue;
    expect(std::memcmp(&buffer[i], &copy[i], sizeof(Logit)) == 0, "memory left alone", s.name, double(i), 0);
  }
  add_to_digest(logprob.data(), rows);
  add_to_digest(entropies.data(), rows);
  add_to_digest(moments.data(), 2 * rows);
  for (int64_t row = 0; row < s.rows; ++row) add_to_digest(gradient + row * gradient_stride, size_t(s.vocabulary));
}

// Kept sets of 1, a few and all ids, in two shards, the gradient in place. The logits that are not kept are NaN.
template <class Logit>
void check_kept_sets(int64_t shard_width) {
  const int64_t rows = 4, vocabulary = 2 * shard_width, stride = vocabulary + 3, width = kPartialWidthWithMoments;
  std::unique_ptr<Logit[]> logits(new Logit[size_t((rows - 1) * stride + vocabulary)]);
  for (int64_t i = 0; i < (rows - 1) * stride + vocabulary; ++i) encode(logits[size_t(i)], NAN);
  auto values = zeros<std::vector<float>>(rows);
  std::vector<int32_t> ids;
  std::vector<int64_t> offsets{0}, targets;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t id = 0; id < vocabulary; ++id) {
      const bool is_kept = row == 0 ? id == shard_width : row == 1 || (row == 2 ? id % 5 == 2 : id < 9);
      if (!is_kept) continue;
      encode(logits[size_t(row * stride + id)], float(8 * (uniform() + uniform() + uniform() - 1.5)));
      values[size_t(row)].push_back(decoded(logits[size_t(row * stride + id)]));
      ids.push_back(int32_t(id));
    }
    offsets.push_back(int64_t(ids.size()));
    targets.push_back(row == 3 ? kIgnoredTarget : ids.back());
  }
  const KeptSets kept{ids.data(), int64_t(ids.size()), offsets.data()};
  auto partials = zeros<float>(2 * rows * width), logprob = zeros<float>(rows), entropies = zeros<float>(rows);
  auto moments = zeros<float>(2 * rows);
  auto state = zeros<float4>(rows);
  const std::vector<float> g(size_t(rows), 0.7f), h(size_t(rows), -0.3f);
  for (int64_t shard = 0; shard < 2; ++shard) {
    const KeptRowStatisticsArguments arguments{
        {logits.get() + shard * shard_width, type_of(Logit{}), rows, shard_width, stride, targets.data(),
         shard * shard_width, kInverseTemperature, true, partials.data() + shard * rows * width, nullptr, nullptr},
        kept};
    megatron_rlvr_kept_row_statistics(&arguments);
  }
  const CombineStatisticsArguments combine{
      partials.data(), 2, rows, true, targets.data(), vocabulary, kInverseTemperature, logprob.data(), entropies.data(),
      &state[0].x, moments.data(), nullptr, nullptr};
  megatron_rlvr_combine_statistics(&combine);
  for (int64_t shard = 0; shard < 2; ++shard) {
    Logit* of_shard = logits.get() + shard * shard_width;
    const KeptLogitsGradientArguments arguments{
        {of_shard, of_shard, type_of(Logit{}), rows, shard_width, stride, stride, targets.data(), shard * shard_width,
         kInverseTemperature, &state[0].x, g.data(), h.data(), nullptr},
        kept};
    megatron_rlvr_kept_logits_gradient(&arguments);
  }
  const double rounding = type_of(Logit{}) == kBFloat16 ? 1.0 / 256 : 1e-5;
  for (int64_t row = 0; row < rows; ++row) {
    const Exact exact = exact_row(values[size_t(row)].data(), int64_t(values[size_t(row)].size()));
    expect_near(logprob[size_t(row)], row == 3 ? 0 : exact.log_probability.back(), 2e-5, "log-prob", "kept sets");
    expect_near(entropies[size_t(row)], exact.entropy, 1e-5, "entropy", "kept sets");
    int64_t at = offsets[size_t(row)];
    for (int64_t id = 0; id < vocabulary; ++id) {
      double expected = 0, probability = 0;
      if (at < offsets[size_t(row + 1)] && ids[size_t(at)] == id) {
        const double log_probability = exact.log_probability[size_t(at - offsets[size_t(row)])];
        probability = std::exp(log_probability);
        expected = 0.7 * (row == 3 ? 0 : double(id == targets[size_t(row)]) - probability);
        expected = kInverseTemperature * (expected + 0.3 * probability * (log_probability + exact.entropy));
        ++at;
      }
      const double found = decoded(logits[size_t(row * stride + id)]);
      expect_near(found, expected, rounding * std::abs(expected) + 4e-6 * probability, "gradient", "kept sets");
    }
  }
  add_to_digest(logprob.data(), size_t(rows));
  add_to_digest(entropies.data(), size_t(rows));
}

// A NaN, a +inf, nothing but -inf, and targets that do not exist: reported by row, and NaN in the results.
void check_bad_rows() {
  const int64_t rows = 5, vocabulary = 600;
  for (int kind = 0; kind < 4; ++kind) {
    std::vector<float> logits(size_t(rows * vocabulary), 0.5f);
    std::vector<int64_t> targets(size_t(rows), 3);
    if (kind == 0) logits[size_t(2 * vocabulary + 577)] = NAN;
    if (kind == 1) logits[size_t(2 * vocabulary + 1)] = INFINITY;
    if (kind == 2) std::fill_n(logits.begin() + 2 * vocabulary, vocabulary, -INFINITY);
    if (kind == 3) targets[2] = vocabulary;
    auto partials = zeros<float>(rows * kPartialWidth), logprob = zeros<float>(rows), entropies = zeros<float>(rows);
    auto state = zeros<float4>(rows);
    int32_t bad_rows[2] = {kNoBadRow, kNoBadRow};
    const RowStatisticsArguments statistics{logits.data(), kFloat32, rows, vocabulary, vocabulary, targets.data(), 0,
                                            1.0, false, partials.data(), nullptr, nullptr};
    megatron_rlvr_row_statistics(&statistics, 1);
    const CombineStatisticsArguments combine{partials.data(), 1, rows, false, targets.data(), vocabulary, 1.0,
                                             logprob.data(), entropies.data(), &state[0].x, nullptr, bad_rows, nullptr};
    megatron_rlvr_combine_statistics(&combine);
    expect(bad_rows[kind == 3] == 2, "bad row reported", "bad rows", bad_rows[kind == 3], 2);
    expect(bad_rows[kind != 3] == kNoBadRow, "nothing else reported", "bad rows", bad_rows[kind != 3], kNoBadRow);
    const bool are_nan = std::isnan(logprob[2]) && std::isnan(entropies[2]);
    if (kind != 3) expect(are_nan, "NaN for a bad row", "bad rows", logprob[2], NAN);
    expect_near(logprob[1], -std::log(double(vocabulary)), 2e-6, "log-prob beside a bad row", "bad rows");
  }
}

// `per_token`: bounds of each token instead of those that the four scalars imply.
void check_objective(bool per_token) {
  const size_t tokens = 3000;
  const float dual_clip = 1.25f;
  std::vector<float> logprob(tokens), old_logprob(tokens), advantage(tokens), weight(tokens), entropies(tokens);
  std::vector<float> low(tokens), high(tokens), objective(tokens), gradient(tokens);
  std::vector<uint8_t> gates(tokens);
  std::unique_ptr<bool[]> mask(new bool[tokens]);
  for (size_t i = 0; i < tokens; ++i) {
    old_logprob[i] = float(-4 * uniform());
    logprob[i] = old_logprob[i] + float(uniform() - 0.5);
    advantage[i] = i % 7 == 0 ? 0.0f : float(uniform() - 0.5);
    weight[i] = float(uniform());
    entropies[i] = float(3 * uniform());
    low[i] = float(0.5 + 0.5 * uniform());
    high[i] = float(1 + uniform());
    mask[i] = i % 5 != 0;
    if (!mask[i]) logprob[i] = low[i] = high[i] = NAN;
  }
  std::vector<int64_t> counts(kObjectiveCounts, 0), expected(kObjectiveCounts, 0);
  const ClippedObjectiveArguments arguments{
      logprob.data(), old_logprob.data(), advantage.data(), mask.get(), weight.data(), entropies.data(),
      int64_t(tokens), {0.3f, -0.13f, 0.5f, -0.25f}, per_token ? low.data() : nullptr,
      per_token ? high.data() : nullptr, dual_clip, objective.data(), gradient.data(), gates.data(), counts.data(),
      nullptr};
  megatron_rlvr_clipped_objective(&arguments, 1);
  size_t floored = 0;
  for (size_t i = 0; i < tokens; ++i) {
    if (!mask[i]) {
      expect(objective[i] == 0 && gradient[i] == 0 && gates[i] == 0, "masked token", "objective", objective[i], 0);
      continue;
    }
    const double ratio = std::exp(double(logprob[i]) - old_logprob[i]), old = std::exp(double(old_logprob[i]));
    const double upper = per_token ? high[i] : 1.5 / (1 + 0.25 * old);
    const double lower = per_token ? low[i] : 0.7 / (1 - 0.13 * old), a = advantage[i];
    const double clipped = std::min(std::max(ratio, lower), upper);
    const bool is_high = a > 0 && ratio > upper, is_low = a < 0 && ratio < lower, is_dual = a < 0 && ratio > dual_clip;
    double wanted = std::min(ratio * a, clipped * a);
    if (a < 0) wanted = std::max(wanted, dual_clip * a);
    expect_near(objective[i], weight[i] * wanted, 1e-6, "objective", "objective");
    const bool is_flat = is_high || is_low || is_dual;
    expect_near(gradient[i], is_flat ? 0 : weight[i] * ratio * a, 1e-6, "objective gradient", "objective");
    const int gate = is_high ? 1 : is_low ? 2 : is_dual ? 3 : 0;
    expect(gates[i] == gate, "gate", "objective", gates[i], gate);
    floored += is_dual;
    expected[kCountClippedHigh] += is_high;
    expected[kCountClippedLow] += is_low;
    if (a != 0) expected[size_t(kCountRegion1 + (a < 0 ? 2 : 0) + (-logprob[i] >= entropies[i] ? 1 : 0))]++;
  }
  expect(floored > 0, "dual clip reached", "objective", double(floored), 1);
  for (size_t i = 0; i < counts.size(); ++i) {
    expect(counts[i] == expected[i], "count", "objective", double(counts[i]), double(expected[i]));
  }
  add_to_digest(objective.data(), tokens);
  add_to_digest(gradient.data(), tokens);
  add_to_digest(gates.data(), tokens);
  add_to_digest(counts.data(), counts.size());
}

// Bytes through global memory for each logit, statistics and gradient together, of rows of no special alignment.
double bytes_per_logit() {
  const int64_t rows = 6, vocabulary = 20001;
  std::vector<__nv_bfloat16> logits(size_t(rows * vocabulary), __float2bfloat16_rn(1.0f));
  const std::vector<int64_t> targets(size_t(rows), 5);
  const std::vector<float> g(size_t(rows), 1.0f), h(size_t(rows), 0.1f);
  auto partials = zeros<float>(rows * kPartialWidth), logprob = zeros<float>(rows), entropies = zeros<float>(rows);
  auto state = zeros<float4>(rows);
  simt::traffic().loaded = simt::traffic().stored = 0;
  const RowStatisticsArguments statistics{logits.data(), kBFloat16, rows, vocabulary, vocabulary, targets.data(), 0,
                                          1.0, false, partials.data(), nullptr, nullptr};
  megatron_rlvr_row_statistics(&statistics, 1);
  const CombineStatisticsArguments combine{partials.data(), 1, rows, false, targets.data(), vocabulary, 1.0,
                                           logprob.data(), entropies.data(), &state[0].x, nullptr, nullptr, nullptr};
  megatron_rlvr_combine_statistics(&combine);
  const LogitsGradientArguments backward{logits.data(), logits.data(), kBFloat16, rows, vocabulary, vocabulary,
                                         vocabulary, targets.data(), 0, 1.0, &state[0].x, g.data(), h.data(), nullptr};
  megatron_rlvr_logits_gradient(&backward, 1);
  return double(simt::traffic().loaded + simt::traffic().stored) / double(rows * vocabulary);
}

}  // namespace

int main(int argument_count, char** arguments) {
  simt::settings().order = argument_count > 1 ? unsigned(std::atoi(arguments[1])) : 0;
  const Shape shapes[] = {
      {"plain", 5, 1024, 1024, 0, 1, true},        {"odd width and stride", 5, 1001, 1003, 1, 1, true},
      {"narrow", 4, 7, 9, 3, 1, false},            {"two shards, out of place", 4, 1202, 1202, 1, 2, false},
      {"few long rows", 2, 40002, 40005, 5, 1, true},
  };
  for (const Shape& shape : shapes) {
    check_logits_kernels<float>(shape);
    check_logits_kernels<__nv_bfloat16>(shape);
  }
  for (const int64_t shard_width : {7, 501, 33001}) {
    check_kept_sets<float>(shard_width);
    check_kept_sets<__nv_bfloat16>(shard_width);
  }
  check_bad_rows();
  for (const bool per_token : {false, true}) check_objective(per_token);
  const double bytes = bytes_per_logit();
  expect(bytes <= 6.1, "bytes per logit", "traffic", bytes, 6.0);
  std::printf("bytes_per_logit %.4f\ndigest %016llx\n%s\n", bytes, static_cast<unsigned long long>(digest),
              failures == 0 ? "all checks hold" : "CHECKS FAILED");
  return failures == 0 ? 0 : 1;
}
