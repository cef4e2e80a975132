// SPDX-License-Identifier: Apache-2.0
// The public C++ API: error messages, and results that do not depend on the number of threads.
#include <gtest/gtest.h>
#include <lors/adapter_grad.h>
#include <lors/cpu.h>
#include <lors/fused_linear.h>
#include <lors/merge.h>
#include <lors/random.h>

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

TEST(Core, ExpertsAreOneByOneOnTheCpu) {
  const int32_t offsets[1] = {0};
  FusedLinearArgs linear;
  AdapterGradArgs gradients;
  linear.experts.offsets = gradients.experts.offsets = offsets;
  for (const Status& status : {fused_linear(linear, nullptr), adapter_grad_lors(gradients, nullptr)})
    EXPECT_NE(status.message().find("takes one expert on the CPU"), std::string::npos) << status.message();
}

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

// reference.py has the same, and tests it.
TEST(Random, KnownAnswers) {
  EXPECT_EQ(mix64(0x9e3779b97f4a7c15), 0xe220a8397b1dcdaf);  // the first number of splitmix64 from 0
  const RandomRow first = random_row(0, 0);
  EXPECT_EQ(first.low, 0xff3cd4bfu);
  EXPECT_EQ(first.high, 0x48218226u);
  EXPECT_EQ(random_word(first, 0u), 0x9beac78fu);
  EXPECT_EQ(int32_t(random_normal(first, 0u)), 342);
  const RandomRow other = random_row(0x0123456789abcdef, 70000);
  EXPECT_EQ(random_word(other, 4095u), 0xa4cdae78u);
  EXPECT_EQ(int32_t(random_normal(other, 4095u)), -132);
  // 1 + 2^-9 in bfloat16, whose step is 2^-7: up if a quarter of 2^32 exceeds the word.
  EXPECT_EQ(round_by_chance(0x3f804000u, 0x3fffffffu, false), 0x3f810000u);
  EXPECT_EQ(round_by_chance(0x3f804000u, 0x40000000u, false), 0x3f800000u);
  // -(2^-24 + 2^-26) in float16, whose step is 2^-24 there, and 2^-27, of which an eighth goes up.
  EXPECT_EQ(round_by_chance(0xb3a00000u, 0x3fffffffu, true), 0xb4000000u);
  EXPECT_EQ(round_by_chance(0xb3a00000u, 0x40000000u, true), 0xb3800000u);
  EXPECT_EQ(round_by_chance(0x32000000u, 0x1fffffffu, true), 0x33800000u);
  EXPECT_EQ(round_by_chance(0x32000000u, 0x20000000u, true), 0u);
  // What has no finite neighbour above it comes back: beyond 65504, infinity, NaN; and what is representable.
  for (const uint32_t bits : {0x477fe001u, 0x7f800000u, 0x7fc00001u, 0x477fe000u, 0x80000000u, 0x33800000u})
    EXPECT_EQ(round_by_chance(bits, 0u, true), bits);
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
