// Checks and times the kernels on a GPU, without torch. Arguments are shapes as ROWS VOCABULARY pairs; see main for the
// default ones.
//
//   nvcc -O3 -std=c++17 -arch=native -I csrc csrc/cuda/*.cu csrc/cuda/bench/benchmark.cu -o benchmark && ./benchmark
//   compute-sanitizer --tool memcheck ./benchmark 67 5003
//
// For each shape it prints the worst error of a few rows against double precision, launched directly and from a
// captured CUDA graph; then the median time of 20 launches, the bandwidth if each logit moves only as often as it
// must, and its ratio to the bandwidth of a device-to-device copy in the same run. The exit status is 1 if a result
// is wrong, and 2 if there is no GPU or the arguments are not shapes.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "cuda/launchers.h"

using namespace megatron_rlvr;

namespace {

void check(int status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(cudaError_t(status)));
  std::exit(status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver ? 2 : 1);
}

template <class Value>
Value* device_buffer(int64_t count) {
  Value* address = nullptr;
  check(cudaMalloc(&address, size_t(std::max<int64_t>(count, 1)) * sizeof(Value)), "cudaMalloc");
  return address;
}

template <class Value>
std::vector<Value> on_host(const Value* address, int64_t count) {
  std::vector<Value> values(static_cast<size_t>(count));
  check(cudaMemcpy(values.data(), address, values.size() * sizeof(Value), cudaMemcpyDeviceToHost), "copy to the host");
  return values;
}

template <class Value>
void to_device(Value* address, const std::vector<Value>& values) {
  const size_t bytes = values.size() * sizeof(Value);
  check(cudaMemcpy(address, values.data(), bytes, cudaMemcpyHostToDevice), "copy to the device");
}

__device__ float hashed_normal(uint64_t index) {  // a sum of uniform numbers is close enough to normal
  float sum = 0;
  for (int i = 0; i < 4; ++i) {
    index = (index ^ (index >> 31)) * 0x9e3779b97f4a7c15u + 12345;
    sum += float(index >> 40) * 0x1p-24f - 0.5f;
  }
  return sum * 1.7320508f;
}
__device__ void assign(float& out, float value) { out = value; }
__device__ void assign(__nv_bfloat16& out, float value) { out = __float2bfloat16_rn(value); }
float widened(float value) { return value; }
float widened(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class Logit>
__global__ void fill(Logit* logits, int64_t count) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    assign(logits[i], 4.0f * hashed_normal(uint64_t(i)));
  }
}

double median_microseconds(cudaStream_t stream, const std::function<void()>& work) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  std::vector<float> times;
  for (int i = 0; i < 23; ++i) {
    check(cudaEventRecord(begin, stream), "event");
    work();
    check(cudaEventRecord(end, stream), "event");
    check(cudaEventSynchronize(end), "event");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end), "event");
    if (i >= 3) times.push_back(milliseconds);
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return 1000.0 * times[times.size() / 2];
}

// The device memory and the launches of a step over [rows, vocabulary] logits.
template <class Logit>
struct Step {
  int64_t rows, vocabulary;
  int multiprocessors;
  cudaStream_t stream;
  Logit *logits, *gradient;
  int64_t* targets;
  float *partials, *workspace, *logprob, *entropy, *state, *g, *h;
  int32_t* bad_rows;

  Step(int64_t rows, int64_t vocabulary, int multiprocessors, cudaStream_t stream)
      : rows(rows), vocabulary(vocabulary), multiprocessors(multiprocessors), stream(stream) {
    logits = device_buffer<Logit>(rows * vocabulary);
    gradient = device_buffer<Logit>(rows * vocabulary);
    targets = device_buffer<int64_t>(rows);
    partials = device_buffer<float>(rows * kPartialWidth);
    workspace = device_buffer<float>(megatron_rlvr_row_statistics_workspace(rows, vocabulary, false, multiprocessors));
    logprob = device_buffer<float>(rows);
    entropy = device_buffer<float>(rows);
    state = device_buffer<float>(rows * kStateWidth);
    g = device_buffer<float>(rows);
    h = device_buffer<float>(rows);
    bad_rows = device_buffer<int32_t>(2);
    fill<<<1024, 256>>>(logits, rows * vocabulary);
    check(cudaDeviceSynchronize(), "fill");
    std::vector<int64_t> ids;
    for (int64_t row = 0; row < rows; ++row) ids.push_back((row * 7919 + 13) % vocabulary);
    to_device(targets, ids);
    to_device(g, std::vector<float>(size_t(rows), 0.75f));
    to_device(h, std::vector<float>(size_t(rows), -0.25f));
    to_device(bad_rows, std::vector<int32_t>(2, kNoBadRow));
  }
  ~Step() {
    void* const all[] = {logits, gradient, targets, partials, workspace, logprob, entropy, state, g, h, bad_rows};
    for (void* address : all) cudaFree(address);
  }
  Step(const Step&) = delete;

  static constexpr int type() { return sizeof(Logit) == 4 ? kFloat32 : kBFloat16; }

  void forward() const {
    const RowStatisticsArguments statistics{logits, type(), rows, vocabulary, vocabulary, targets, 0, 1.0, false,
                                            partials, workspace, stream};
    check(megatron_rlvr_row_statistics(&statistics, multiprocessors), "row_statistics");
    const CombineStatisticsArguments combine{partials, 1, rows, false, targets, vocabulary, 1.0,
                                             logprob, entropy, state, nullptr, bad_rows, stream};
    check(megatron_rlvr_combine_statistics(&combine), "combine_statistics");
  }
  void backward(Logit* out) const {
    const LogitsGradientArguments arguments{logits, out, type(), rows, vocabulary, vocabulary, vocabulary, targets, 0,
                                            1.0, state, g, h, stream};
    check(megatron_rlvr_logits_gradient(&arguments, multiprocessors), "logits_gradient");
  }
};

// Whether log-prob, entropy and gradient of a few rows agree with double precision.
template <class Logit>
bool is_right(const Step<Logit>& step, const char* how) {
  check(cudaStreamSynchronize(step.stream), how);
  const int64_t vocabulary = step.vocabulary;
  const auto logprob = on_host(step.logprob, step.rows), entropy = on_host(step.entropy, step.rows);
  const auto targets = on_host(step.targets, step.rows);
  double logprob_error = 0, entropy_error = 0, gradient_error = 0;
  for (const int64_t row : {int64_t(0), step.rows / 2, step.rows - 1}) {
    const auto logits = on_host(step.logits + row * vocabulary, vocabulary);
    const auto gradient = on_host(step.gradient + row * vocabulary, vocabulary);
    double sum = 0, exact_entropy = 0;
    for (const Logit z : logits) sum += std::exp(double(widened(z)));
    for (const Logit z : logits) {
      const double ln_p = widened(z) - std::log(sum);
      exact_entropy -= std::exp(ln_p) * ln_p;
    }
    double squared_error = 0, squared = 0;
    for (int64_t i = 0; i < vocabulary; ++i) {
      const double ln_p = widened(logits[size_t(i)]) - std::log(sum), p = std::exp(ln_p);
      const double exact = 0.75 * ((i == targets[size_t(row)]) - p) + 0.25 * p * (ln_p + exact_entropy);
      squared_error += std::pow(widened(gradient[size_t(i)]) - exact, 2);
      squared += exact * exact;
    }
    const double exact_logprob = widened(logits[size_t(targets[size_t(row)])]) - std::log(sum);
    logprob_error = std::max(logprob_error, std::abs(logprob[size_t(row)] - exact_logprob));
    entropy_error = std::max(entropy_error, std::abs(entropy[size_t(row)] - exact_entropy));
    gradient_error = std::max(gradient_error, std::sqrt(squared_error / squared));
  }
  const auto bad_rows = on_host(step.bad_rows, 2);
  const bool right = logprob_error < 4e-6 && entropy_error < 1e-5 &&
                     gradient_error < (sizeof(Logit) == 4 ? 1e-5 : 4e-3) && bad_rows[0] == kNoBadRow &&
                     bad_rows[1] == kNoBadRow;
  std::printf("  %-14s log-prob %.1e entropy %.1e gradient %.1e %s\n", how, logprob_error, entropy_error,
              gradient_error, right ? "right" : "WRONG");
  return right;
}

template <class Logit>
bool benchmark(const char* type, int64_t rows, int64_t vocabulary, int multiprocessors, cudaStream_t stream) {
  const Step<Logit> step(rows, vocabulary, multiprocessors, stream);
  const int64_t bytes = rows * vocabulary * int64_t(sizeof(Logit));
  std::printf("%s [%lld, %lld]\n", type, static_cast<long long>(rows), static_cast<long long>(vocabulary));
  step.forward();
  step.backward(step.gradient);
  bool right = is_right(step, "direct");

  check(cudaMemset(step.gradient, 0, size_t(bytes)), "clear");
  check(cudaMemset(step.state, 0, size_t(rows * kStateWidth) * sizeof(float)), "clear");
  check(cudaDeviceSynchronize(), "clear");
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  step.forward();
  step.backward(step.gradient);
  check(cudaStreamEndCapture(stream, &graph), "capture");
  check(cudaGraphInstantiate(&executable, graph, 0), "instantiate the graph");
  check(cudaGraphLaunch(executable, stream), "launch the graph");
  right = is_right(step, "from a graph") && right;
  check(cudaGraphExecDestroy(executable), "graph");
  check(cudaGraphDestroy(graph), "graph");

  const double copy = median_microseconds(stream, [&] {
    check(cudaMemcpyAsync(step.gradient, step.logits, size_t(bytes), cudaMemcpyDeviceToDevice, stream), "copy");
  });
  const double copy_bandwidth = 2 * bytes / copy * 1e-3;
  const auto report = [&](const char* what, double microseconds, double moved) {
    const double bandwidth = moved / microseconds * 1e-3;
    const double ratio = bandwidth / copy_bandwidth;
    std::printf("  %-14s %9.1f us %7.0f GB/s, %.2f of a copy\n", what, microseconds, bandwidth, ratio);
  };
  report("copy", copy, 2.0 * bytes);
  report("forward", median_microseconds(stream, [&] { step.forward(); }), double(bytes));
  report("backward", median_microseconds(stream, [&] { step.backward(step.gradient); }), 2.0 * bytes);
  report("in place", median_microseconds(stream, [&] { step.backward(step.logits); }), 2.0 * bytes);
  return right;
}

}  // namespace

int main(int argument_count, char** arguments) {
  int count = 0, multiprocessors = 0;
  check(cudaGetDeviceCount(&count), "no GPU");
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "device");
  multiprocessors = properties.multiProcessorCount;
  std::printf("%s, %d multiprocessors\n", properties.name, multiprocessors);
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  std::vector<int64_t> sizes{4096, 32768, 4096, 151936, 4095, 18993, 64, 151936, 1, 262144};
  if (argument_count > 1) {
    sizes.clear();
    for (int i = 1; i < argument_count; ++i) sizes.push_back(std::atoll(arguments[i]));
    if (sizes.size() % 2 || *std::min_element(sizes.begin(), sizes.end()) < 1) {
      std::fprintf(stderr, "arguments: must be pairs of positive numbers, ROWS VOCABULARY ...\n");
      return 2;
    }
  }
  bool right = true;
  for (size_t i = 0; i < sizes.size(); i += 2) {
    right = benchmark<__nv_bfloat16>("bf16", sizes[i], sizes[i + 1], multiprocessors, stream) && right;
    right = benchmark<float>("fp32", sizes[i], sizes[i + 1], multiprocessors, stream) && right;
  }
  return right ? 0 : 1;
}
