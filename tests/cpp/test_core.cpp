// SPDX-License-Identifier: Apache-2.0
// The public C++ API: refusals, and results that do not depend on how the work is shared out.
#include <gtest/gtest.h>
#include <lors/adapter_grad.h>
#include <lors/cpu.h>
#include <lors/fused_linear.h>
#include <lors/merge.h>

#include <random>
#include <thread>
#include <vector>

namespace lors {
namespace {

std::vector<float> random(int64_t count, unsigned seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<float> out(count);
  for (float& x : out) x = normal(rng);
  return out;
}

// A pool that cuts the work into as many pieces as the grain allows, each on a thread of its own.
void run_in_pieces(int64_t count, int64_t grain, CpuHost::Body body, void* context) {
  std::vector<std::thread> threads;
  for (int64_t begin = 0; begin < count; begin += grain)
    threads.emplace_back(body, context, begin, std::min(begin + grain, count));
  for (std::thread& thread : threads) thread.join();
}
const CpuHost kPieces{run_in_pieces, nullptr, nullptr};
const CpuHost* const kPool = &kPieces;

TEST(Core, ResultsDoNotDependOnTheThreads) {
  const int64_t T = 50, N = 700, K = 650, r = 9;
  const auto weight = random(N * K, 1), lora_A = random(r * K, 2), lora_B = random(N * r, 3), X = random(T * K, 4),
             dY = random(T * N, 5);
  std::vector<std::vector<float>> merged(2, std::vector<float>(N * K)), dA(2, std::vector<float>(r * K)),
      dB(2, std::vector<float>(N * r)), Y(2, std::vector<float>(T * N));
  for (int i = 0; i < 2; ++i) {
    const CpuHost* host = i ? kPool : nullptr;
    MergeArgs merge_args;
    merge_args.out_features = N;
    merge_args.in_features = K;
    merge_args.r = r;
    merge_args.weight = weight.data();
    merge_args.lora_A = lora_A.data();
    merge_args.lora_B = lora_B.data();
    merge_args.merged = merged[i].data();
    ASSERT_TRUE(merge(merge_args, host).ok());
    AdapterGradArgs grad_args;
    grad_args.tokens = T;
    grad_args.out_features = N;
    grad_args.in_features = K;
    grad_args.r = r;
    grad_args.grad_output = dY.data();
    grad_args.input = X.data();
    grad_args.lora_A = lora_A.data();
    grad_args.lora_B = lora_B.data();
    grad_args.lora_A_grad = dA[i].data();
    grad_args.lora_B_grad = dB[i].data();
    ASSERT_TRUE(adapter_grad_lors(grad_args, host).ok());
    FusedLinearArgs linear_args;
    linear_args.tokens = T;
    linear_args.out_features = N;
    linear_args.in_features = K;
    linear_args.r = r;
    linear_args.activation = X.data();
    linear_args.weight = weight.data();
    linear_args.lora_A = lora_A.data();
    linear_args.lora_B = lora_B.data();
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
