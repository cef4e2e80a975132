// SPDX-License-Identifier: Apache-2.0
// Launches fused_linear: checks dtypes, takes the fast path where fused_linear_fast_config serves, else the tiling of
// fused_linear_config and the kernel of dtype, token tile and direction, and adds up a split reduction by reduce.cu.
#include "fused_linear.cuh"

#include <lors/fused_linear.h>

#include "fused_linear_fast_config.h"
#include "launch.h"
#include "reduce.cuh"

namespace lors {
namespace {

using namespace cuda;

template <typename T, int kTokens>
Status launch_matmul(bool input_gradient, const FusedProblem& problem, const CudaHost& host) {
  return launch("fused_linear", input_gradient ? fused_linear_kernel<T, kTokens, true> : fused_linear_kernel<T, kTokens, false>,
                dim3(static_cast<unsigned>(problem.config.blocks)), dim3(static_cast<unsigned>(problem.config.threads)),
                problem.config.shared_bytes, host, problem);
}

template <typename T>
Status launch_both(const FusedLinearArgs& args, const FusedProblem& problem, const MergeConfig& fast, const CudaHost& host) {
  const bool input_gradient = args.input_gradient;
  const auto matmul = [&] {
    if (fast.columns) return fused_linear_fast(args, problem, fast, host);
    if (problem.config.token_tile == 16) return launch_matmul<T, 16>(input_gradient, problem, host);
    if constexpr (!std::is_same_v<T, float>) {
      if (problem.config.token_tile == 64) return launch_matmul<T, 64>(input_gradient, problem, host);
    }
    return launch_matmul<T, std::is_same_v<T, float> ? 16 : kFusedWideTokens>(input_gradient, problem, host);
  };
  if (Status status = matmul(); !status.ok() || problem.partial == nullptr) return status;
  PartialSums sums;
  sums.partials = problem.partial;
  sums.count = problem.config.splits;
  sums.rows = problem.tokens;
  sums.width = problem.partial_pitch;
  sums.columns = sums.out_pitch = problem.columns;
  sums.bias = problem.bias;
  sums.experts = problem.experts;
  sums.out = problem.output;
  sums.dtype = dtype_of<T>();
  return reduce_partials({sums}, host);
}

Status check_supported(const FusedLinearArgs& args) {
  if (Status status =
          check_no_float64("fused_linear", {args.activation_dtype, args.weight_dtype, args.lora_A_dtype, args.lora_B_dtype,
                                            args.bias != nullptr ? args.bias_dtype : args.activation_dtype});
      !status.ok())
    return status;
  if (args.round_to != args.activation_dtype || args.output_dtype != args.activation_dtype)
    return Status::error(
        std::string("fused_linear on CUDA rounds the merged weight and the output to the activation's dtype, ") +
        dtype_name(args.activation_dtype) + ", and was asked for " + dtype_name(args.round_to) + " and " +
        dtype_name(args.output_dtype) + "; ask for the same round_to and output_dtype, or use merge and a matmul.");
  return {};
}

}  // namespace

Status fused_linear(const FusedLinearArgs& args, const CudaHost& host) {
  const bool gradient = args.input_gradient;
  const int64_t N = args.out_features, K = args.in_features;
  if (args.quantization.grid != Grid::none)
    return Status::error("fused_linear on CUDA reads values, and was given quantised codes; merge, then multiply.");
  if (Status status = check_supported(args); !status.ok()) return status;
  if (Status status = check_experts("fused_linear", args.experts, args.tokens); !status.ok()) return status;

  FusedShape shape;
  shape.tokens = args.tokens;
  shape.groups = args.experts.offsets ? args.experts.count + 1 : 1;
  shape.columns = gradient ? K : N;
  shape.depth = gradient ? N : K;
  shape.r = args.r;
  shape.input_gradient = gradient;
  shape.activation = args.activation_dtype;
  shape.weight = args.weight_dtype;
  shape.own = gradient ? args.lora_A_dtype : args.lora_B_dtype;
  shape.other = gradient ? args.lora_B_dtype : args.lora_A_dtype;
  if (shape.tokens == 0 || shape.columns == 0) return {};

  DeviceLimits limits;
  if (Status status = device_limits(limits); !status.ok()) return status;
  const MergeConfig fast = fused_fast_config(args, split_terms(args.lora_A_dtype), split_terms(args.lora_B_dtype), limits);
  if (!fast.columns && args.weight_layout != Layout::dense)
    return Status::error(
        "fused_linear on CUDA reads a compressed weight for up to " + std::to_string(kFusedFastTokens) +
        " tokens, with experts in the mean, of the weight's own 16-bit dtype, 1 to " + std::to_string(kMergeFastRanks) +
        " ranks, in_features a multiple of 8, an aligned weight, and as much shared memory as that takes; was given " +
        std::to_string(args.tokens) + " tokens of " + dtype_name(args.activation_dtype) + ", a weight [" + std::to_string(N) +
        ", " + std::to_string(K) + "] of " + dtype_name(args.weight_dtype) + " and " + std::to_string(args.r) +
        " ranks on a device with " + std::to_string(limits.shared_bytes) +
        " bytes of shared memory per block. Merge, then multiply.");
  FusedProblem problem{};
  if (fast.columns)
    problem.config.splits = gradient ? fast.blocks / fast.column_blocks : fast.column_blocks;
  else
    problem.config = fused_linear_config(shape, limits);
  const FusedConfig& config = problem.config;
  if (fast.columns ? fused_fast_blocks(args, fast) > 0x7fffffff
                   : config.token_tile == 0 || config.blocks > 0x7fffffff ||
                         config.split_steps * config.rank_chunks > 0x7fffffff - kFusedMaxStages)
    return Status::error("fused_linear found no tiling of " + std::to_string(args.tokens) + " tokens and a weight of [" +
                         std::to_string(N) + ", " + std::to_string(K) + "] with r = " + std::to_string(args.r) +
                         " for a device with " + std::to_string(limits.shared_bytes) +
                         " bytes of shared memory per block; use merge and a matmul instead.");
  problem.activation = args.activation;
  problem.weight = args.weight;
  problem.mask = reinterpret_cast<const uint8_t*>(args.mask);
  problem.mask_pitch = 4 * mask_words(K);
  // Without ranks nothing of the adapter is read, but an address is formed.
  const Matrix lora_A = matrix(args.r > 0 ? args.lora_A : args.weight, args.lora_A_dtype, args.r, K);
  const Matrix lora_B = matrix(args.r > 0 ? args.lora_B : args.weight, args.lora_B_dtype, N, args.r);
  problem.own = gradient ? lora_A : lora_B;
  problem.other = gradient ? lora_B : lora_A;
  if (args.bias != nullptr && !gradient) problem.bias = matrix(args.bias, args.bias_dtype, args.experts.count, N);
  problem.output = args.output;
  problem.experts = expert_rows(args.experts);
  problem.tokens = shape.tokens;
  problem.columns = shape.columns;
  problem.depth = shape.depth;
  problem.in_features = K;
  problem.scaling = args.r > 0 ? static_cast<float>(args.scaling) : 0.f;
  problem.weight_dtype = args.weight_dtype;
  problem.weight_vectors = has_vectors(args.weight, K);
  problem.activation_vectors = has_vectors(args.activation, shape.depth);
  problem.output_vectors = has_vectors(args.output, shape.columns);

  problem.partial_pitch = fused_parts(shape.columns, 8) * 8;
  const Scratch partial(host, fast.columns || config.splits > 1 ? config.splits * shape.tokens * problem.partial_pitch : 0);
  problem.partial = partial.data();
  if (args.activation_dtype == DType::bfloat16) return launch_both<bfloat16>(args, problem, fast, host);
  if (args.activation_dtype == DType::float16) return launch_both<float16>(args, problem, fast, host);
  return launch_both<float>(args, problem, fast, host);
}

}  // namespace lors
