// SPDX-License-Identifier: Apache-2.0
// Launches fused_linear: checks dtypes, takes the tiling of fused_linear_config, picks the kernel by dtype, token tile and
// direction, and adds up a split reduction with a second kernel.
#include "fused_linear.cuh"

#include <lors/fused_linear.h>

#include "launch.h"

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
Status launch_both(bool input_gradient, const FusedProblem& problem, const CudaHost& host) {
  const auto matmul = [&] {
    if (problem.config.token_tile == 16) return launch_matmul<T, 16>(input_gradient, problem, host);
    if constexpr (!std::is_same_v<T, float>) {
      if (problem.config.token_tile == 64) return launch_matmul<T, 64>(input_gradient, problem, host);
    }
    return launch_matmul<T, std::is_same_v<T, float> ? 16 : kFusedWideTokens>(input_gradient, problem, host);
  };
  if (Status status = matmul(); !status.ok() || problem.partial == nullptr) return status;
  const int64_t blocks = fused_parts(problem.tokens * problem.partial_pitch / 8, kFusedThreads);
  return launch("fused_linear_sum", fused_linear_sum_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kFusedThreads), 0,
                host, problem);
}

Status check_supported(const FusedLinearArgs& args) {
  if (args.weight_layout != Layout::dense)
    return Status::error("fused_linear on CUDA reads dense weights only; merge, then multiply.");
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
  if (Status status = check_supported(args); !status.ok()) return status;

  FusedShape shape;
  shape.tokens = args.tokens;
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
  FusedProblem problem{};
  problem.config = fused_linear_config(shape, limits);
  const FusedConfig& config = problem.config;
  if (config.token_tile == 0 || config.blocks > 0x7fffffff ||
      config.split_steps * config.rank_chunks > 0x7fffffff - kFusedMaxStages)
    return Status::error("fused_linear found no tiling of " + std::to_string(args.tokens) + " tokens and a weight of [" +
                         std::to_string(N) + ", " + std::to_string(K) + "] with r = " + std::to_string(args.r) +
                         " for a device with " + std::to_string(limits.shared_bytes) +
                         " bytes of shared memory per block; use merge and a matmul instead.");
  problem.activation = args.activation;
  problem.weight = args.weight;
  problem.mask = reinterpret_cast<const uint8_t*>(args.mask);
  problem.mask_pitch = 4 * mask_words(K);
  const Matrix lora_A = matrix(args.lora_A, args.lora_A_dtype, args.r, K);
  const Matrix lora_B = matrix(args.lora_B, args.lora_B_dtype, N, args.r);
  problem.own = gradient ? lora_A : lora_B;
  problem.other = gradient ? lora_B : lora_A;
  if (args.bias != nullptr && !gradient) problem.bias = matrix(args.bias, args.bias_dtype, 1, N);
  problem.output = args.output;
  problem.tokens = shape.tokens;
  problem.columns = shape.columns;
  problem.depth = shape.depth;
  problem.in_features = K;
  problem.scaling = static_cast<float>(args.scaling);
  problem.weight_dtype = args.weight_dtype;
  problem.weight_vectors = has_vectors(args.weight, K);
  problem.activation_vectors = has_vectors(args.activation, shape.depth);
  problem.output_vectors = has_vectors(args.output, shape.columns);

  problem.partial_pitch = fused_parts(shape.columns, 8) * 8;
  const Scratch partial(host, config.splits > 1 ? config.splits * shape.tokens * problem.partial_pitch : 0);
  problem.partial = partial.data();
  if (args.activation_dtype == DType::bfloat16) return launch_both<bfloat16>(gradient, problem, host);
  if (args.activation_dtype == DType::float16) return launch_both<float16>(gradient, problem, host);
  return launch_both<float>(gradient, problem, host);
}

}  // namespace lors
