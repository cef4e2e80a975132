// SPDX-License-Identifier: Apache-2.0
// A device, a stream and cuSPARSELt that are all fakes (tests/fake_cusparselt), for the host code of csrc/core/cuda.
#pragma once

#include <gtest/gtest.h>
#include <lors/product_choice.h>
#include <lors/types.h>

#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "../fake_cusparselt/fake_stream.h"
#include "cuda/cusparselt.h"

namespace lors::fake {

struct Device {
  int major = 8, minor = 0;
  int64_t scratch = 0;  // blocks handed out and not given back
  int64_t allocations = 0;
  bool out_of_memory = false;
  FakeStream stream;
};
extern Device device;

// Memory of the fake device on its stream; blocks are aligned to 256 bytes and, so that no one counts on more, not to 512.
CudaHost host();

// FAKE_CUSPARSELT_<name> for as long as this lives.
class Setting {
 public:
  Setting(const char* name, const std::string& value) : name_(std::string("FAKE_CUSPARSELT_") + name) {
    setenv(name_.c_str(), value.c_str(), 1);
  }
  ~Setting() { unsetenv(name_.c_str()); }

 private:
  std::string name_;
};

enum class Abi { bytes512, bytes1024, bytes1536 };
const char* path(Abi abi);
int calls(Abi abi, const char* name);  // of the fake library so far
int live(Abi abi);
int entered_twice(Abi abi);

uint16_t narrow(double value, DType dtype);
double widen(uint16_t bits, DType dtype);

// A 2:4 weight and its products, in double precision.
struct Problem {
  Problem(int64_t N, int64_t K, int64_t T, DType dtype, bool transposable, unsigned seed);

  // What each output should be, and how far it may be off: a rounding to dtype of a sum of products, and of the weight.
  double expected(bool input_gradient, int64_t t, int64_t i, double addend = 0) const;
  void check(bool input_gradient, const std::vector<uint16_t>& output, double addend = 0) const;
  int64_t out(bool input_gradient) const { return input_gradient ? K : N; }
  const std::vector<uint16_t>& activation(bool input_gradient) const { return input_gradient ? dY : X; }
  SparseProductProblem key(bool input_gradient) const { return {N, K, T, dtype, input_gradient}; }

  int64_t N, K, T;
  DType dtype;
  std::vector<uint16_t> W, X, dY;  // [N, K], [T, K], [T, N]
};

// Bytes that begin at a multiple of 16.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : data_(bytes + 16) {}
  void* data() { return data_.data() + (16 - reinterpret_cast<uintptr_t>(data_.data()) % 16) % 16; }

 private:
  std::vector<unsigned char> data_;
};

}  // namespace lors::fake
