// SPDX-License-Identifier: Apache-2.0
// Launches the fast path of fused_linear; fused_linear.cu decides when (fused_linear_fast_config.h).
#include "fused_linear_fast.cuh"

#include "launch.h"

namespace lors::cuda {
namespace {

template <template <typename, typename> typename Source, typename T, bool kGradient>
Status run(const MergeProblem& p, const FusedProblem& f, const MergeConfig& config, int extra_at, int64_t blocks,
           const CudaHost& host) {
  auto* kernel = fused_linear_fast_kernel<Source, T, kGradient, false>;
  // Adapters of one split term are bfloat16, and seldom beside a float16 weight.
  if constexpr (std::is_same_v<T, bfloat16> && !kGradient)
    if (split_terms(p.lora_A.dtype) == 1 && split_terms(p.lora_B.dtype) == 1 && config.chunk == 16)
      kernel = fused_linear_fast_kernel<Source, T, kGradient, true>;
  return launch("fused_linear", kernel, dim3(static_cast<unsigned>(blocks)), dim3(kFusedFastThreads), config.shared_bytes, host,
                p, f, config.columns, extra_at, config.shared_bytes - kFusedFastTileBytes,
                static_cast<unsigned>(config.blocks));
}

template <template <typename, typename> typename Source>
Status run(const FusedLinearArgs& args, const MergeProblem& p, const FusedProblem& f, const MergeConfig& config,
           const CudaHost& host) {
  const int extra_at = config.tile_at + fast_tile_bytes(args, config.columns, config.panel_rows, kFusedFastThreads);
  const int64_t blocks = fused_fast_blocks(args, config);
  const bool bf16 = args.activation_dtype == DType::bfloat16;
  if (args.input_gradient)
    return bf16 ? run<Source, bfloat16, true>(p, f, config, extra_at, blocks, host)
                : run<Source, float16, true>(p, f, config, extra_at, blocks, host);
  return bf16 ? run<Source, bfloat16, false>(p, f, config, extra_at, blocks, host)
              : run<Source, float16, false>(p, f, config, extra_at, blocks, host);
}

}  // namespace

Status fused_linear_fast(const FusedLinearArgs& args, const FusedProblem& problem, const MergeConfig& config,
                         const CudaHost& host) {
  MergeProblem p = merge_problem(args, config);
  const Scratch before(host, args.weight_layout == Layout::bitmap ? args.experts.count * p.out_features * p.column_blocks : 0);
  if (before.data())
    if (Status status = count_before(p, before.data(), config.columns, host, problem.experts); !status.ok()) return status;
  if (args.weight_layout == Layout::bitmap) return run<FastBitmap>(args, p, problem, config, host);
  if (args.weight_layout == Layout::sparse24) return run<FastSparse24>(args, p, problem, config, host);
  return args.mask ? run<FastMasked>(args, p, problem, config, host) : run<FastDense>(args, p, problem, config, host);
}

}  // namespace lors::cuda
