// SPDX-License-Identifier: Apache-2.0
#include "fake_device.h"

#include <dlfcn.h>

#include <bit>
#include <cmath>
#include <stdexcept>

#include "runtime.h"

cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "the fake device refused"; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? lors::fake::device.major : lors::fake::device.minor;
  return cudaSuccess;
}

namespace lors::fake {

Device device;

namespace {

void* allocate(int64_t bytes, void** handle) {
  if (device.out_of_memory) throw std::runtime_error("the fake device is out of memory");
  ++device.scratch;
  ++device.allocations;
  auto* block = static_cast<char*>(std::aligned_alloc(512, (bytes + 256 + 511) / 512 * 512));
  *handle = block;
  return block + 256;
}

void release(void* handle) {
  --device.scratch;
  std::free(handle);
}

template <typename Function>
Function* symbol(Abi abi, const char* name) {
  return reinterpret_cast<Function*>(dlsym(dlopen(path(abi), RTLD_LAZY), name));
}

}  // namespace

CudaHost host() { return {&device.stream, allocate, release}; }

const char* path(Abi abi) {
  return abi == Abi::bytes512 ? LORS_FAKE_512 : abi == Abi::bytes1024 ? LORS_FAKE_1024 : LORS_FAKE_1536;
}
int calls(Abi abi, const char* name) { return symbol<int(const char*)>(abi, "fake_calls")(name); }
int live(Abi abi) { return symbol<int()>(abi, "fake_live")(); }
int entered_twice(Abi abi) { return symbol<int()>(abi, "fake_entered_twice")(); }

double widen(uint16_t bits, DType dtype) {
  if (dtype == DType::bfloat16) return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return bits & 0x8000 ? -size : size;
}

// By search: what rounds to nearest is the nearest.
uint16_t narrow(double value, DType dtype) {
  uint16_t low = 0, high = dtype == DType::bfloat16 ? 0x7f7f : 0x7bff;
  const double size = std::fabs(value);
  while (high - low > 1) {
    const auto middle = static_cast<uint16_t>((low + high) / 2);
    (widen(middle, dtype) <= size ? low : high) = middle;
  }
  const uint16_t nearest = size - widen(low, dtype) <= widen(high, dtype) - size ? low : high;
  return value < 0 ? nearest | 0x8000 : nearest;
}

Problem::Problem(int64_t N, int64_t K, int64_t T, DType dtype, bool transposable, unsigned seed)
    : N(N), K(K), T(T), dtype(dtype), W(N * K), X(T * K), dY(T * N) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  for (auto* values : {&X, &dY})
    for (uint16_t& v : *values) v = narrow(normal(random), dtype);
  for (int64_t n = 0; n < N; ++n)
    for (int64_t g = 0; g < K / 4; ++g) {
      // Two of four columns; transposable: the same two of each row, shifted, so that columns have two of four as well.
      const int first = transposable ? static_cast<int>((n + g) % 4) : static_cast<int>(random() % 4);
      const int second = transposable ? (first + 2) % 4 : static_cast<int>(random() % 4);
      const int kept = transposable ? 2 : static_cast<int>(random() % 3);
      if (kept > 0) W[n * K + 4 * g + first] = narrow(normal(random), dtype);
      if (kept > 1) W[n * K + 4 * g + second] = narrow(normal(random), dtype);
    }
}

double Problem::expected(bool input_gradient, int64_t t, int64_t i, double addend) const {
  double sum = addend;
  for (int64_t j = 0; j < (input_gradient ? N : K); ++j)
    sum += widen(activation(input_gradient)[t * (input_gradient ? N : K) + j], dtype) *
           widen(input_gradient ? W[j * K + i] : W[i * K + j], dtype);
  return sum;
}

void Problem::check(bool input_gradient, const std::vector<uint16_t>& output, double addend) const {
  const double unit_roundoff = dtype == DType::bfloat16 ? 1.0 / 256 : 1.0 / 2048;
  for (int64_t t = 0; t < T; ++t)
    for (int64_t i = 0; i < out(input_gradient); ++i) {
      const double wanted = expected(input_gradient, t, i, addend);
      const double given = widen(output[t * out(input_gradient) + i], dtype);
      ASSERT_NEAR(given, wanted, unit_roundoff * std::fabs(wanted) + 1e-6) << "at " << t << ", " << i;
    }
}

}  // namespace lors::fake
