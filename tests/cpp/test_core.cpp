// SPDX-License-Identifier: Apache-2.0
// The public C++ API: error messages, and results that do not depend on the number of threads.
#include <gtest/gtest.h>
#include <lors/adapter_grad.h>
#include <lors/cpu.h>
#include <lors/fused_linear.h>
#include <lors/merge.h>

#include <random>
#include <vector>

#include "layouts.h"

namespace lors {
namespace {

std::vector<float> random(int64_t count, unsigned seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<float> out(count);
  for (float& x : out) x = normal(rng);
  return out;
}

const CpuHost* const kPool = &test::kPieces;

TEST(Core, ResultsDoNotDependOnTheThreads) {
  const int64_t T = 50, N = 700, K = 650, r = 9;
  const auto weight = random(N * K, 1), lora_A = random(r * K, 2), lora_B = random(N * r, 3), X = random(T * K, 4),
             dY = random(T * N, 5);
  std::vector<std::vector<float>> merged(2, std::vector<float>(N * K)), dA(2, std::vector<float>(r * K)),
      dB(2, std::vector<float>(N * r)), Y(2, std::vector<float>(T * N));
  const auto describe = [&](auto& args) {
    args.out_features = N;
    args.in_features = K;
    args.r = r;
    args.lora_A = lora_A.data();
    args.lora_B = lora_B.data();
  };
  for (int i = 0; i < 2; ++i) {
    const CpuHost* host = i ? kPool : nullptr;
    MergeArgs merge_args;
    describe(merge_args);
    merge_args.weight = weight.data();
    merge_args.merged = merged[i].data();
    ASSERT_TRUE(merge(merge_args, host).ok());
    AdapterGradArgs grad_args;
    describe(grad_args);
    grad_args.tokens = T;
    grad_args.grad_output = dY.data();
    grad_args.input = X.data();
    grad_args.lora_A_grad = dA[i].data();
    grad_args.lora_B_grad = dB[i].data();
    ASSERT_TRUE(adapter_grad_lors(grad_args, host).ok());
    FusedLinearArgs linear_args;
    describe(linear_args);
    linear_args.tokens = T;
    linear_args.activation = X.data();
    linear_args.weight = weight.data();
    linear_args.output = Y[i].data();
    ASSERT_TRUE(fused_linear(linear_args, host).ok());
  }
  EXPECT_EQ(merged[0], merged[1]);
  EXPECT_EQ(dA[0], dA[1]);
  EXPECT_EQ(dB[0], dB[1]);
  EXPECT_EQ(Y[0], Y[1]);
}

TEST(Core, RefusesWhatItCannotDo) {
  MergeArgs args;
  args.out_features = args.in_features = args.r = 1;
  args.weight_dtype = DType::float64;
  EXPECT_NE(merge(args, nullptr).message().find("float64"), std::string::npos);
  args.weight_dtype = DType::float32;
  args.merged_dtype = DType::bfloat16;
  args.round_to = DType::float16;
  EXPECT_NE(merge(args, nullptr).message().find("round"), std::string::npos);
  EXPECT_STRNE(cpu_capability(), "");
}

}  // namespace
}  // namespace lors
