// SPDX-License-Identifier: Apache-2.0
// Launches the merge: checks what the kernel cannot do, asks merge_config how to cut the work, picks the kernel by dtypes.
#include "merge.cuh"

#include <lors/merge.h>

#include "launch.h"
#include "merge_compressed.h"

namespace lors {
namespace {

using namespace cuda;

template <typename W, typename Out>
Status launch_merge(const MergeProblem& problem, const MergeConfig& config, const CudaHost& host) {
  return launch("merge", merge_kernel<W, Out>, dim3(static_cast<unsigned>(config.blocks)),
                dim3(static_cast<unsigned>(config.columns)), config.shared_bytes, host, problem);
}

template <typename W>
Status launch_merge(DType merged, const MergeProblem& problem, const MergeConfig& config, const CudaHost& host) {
  if (merged == DType::bfloat16) return launch_merge<W, bfloat16>(problem, config, host);
  if (merged == DType::float16) return launch_merge<W, float16>(problem, config, host);
  return launch_merge<W, float>(problem, config, host);
}

}  // namespace

Status merge(const MergeArgs& args, const CudaHost& host) {
  if (args.weight_layout != Layout::dense) return merge_compressed(args, host);
  const int64_t N = args.out_features, K = args.in_features;
  if (N == 0 || K == 0) return {};
  for (const DType dtype : {args.weight_dtype, args.merged_dtype, args.lora_A_dtype, args.lora_B_dtype})
    if (dtype == DType::float64)
      return Status::error(
          "merge on CUDA takes float32, bfloat16 and float16, and was given float64; convert the tensors or "
          "move them to the CPU.");
  if (args.round_to != args.merged_dtype)
    return Status::error("merge on CUDA rounds to the dtype it writes; ask for the same round_to and merged_dtype.");

  DeviceLimits limits;
  if (Status status = device_limits(limits); !status.ok()) return status;
  MergeProblem problem{};
  problem.weight = args.weight;
  problem.mask = args.mask;
  problem.mask_words = mask_words(K);
  problem.lora_A = matrix(args.lora_A, args.lora_A_dtype, args.r, K);
  problem.lora_B = matrix(args.lora_B, args.lora_B_dtype, N, args.r);
  problem.merged = args.merged;
  problem.out_features = N;
  problem.in_features = K;
  problem.scaling = static_cast<float>(args.scaling);
  problem.weight_vectors = has_vectors(args.weight, K);
  problem.merged_vectors = has_vectors(args.merged, K);
  const MergeConfig config = merge_config(N, K, args.r, split_terms(args.lora_A_dtype), split_terms(args.lora_B_dtype),
                                          Layout::dense, static_cast<int>(dtype_size(args.weight_dtype)), limits);
  if (config.columns == 0 || config.blocks > 0x7fffffff)
    return Status::error("merge found no way to cut a weight of [" + std::to_string(N) + ", " + std::to_string(K) +
                         "] for a device with " + std::to_string(limits.shared_bytes) +
                         " bytes of shared memory per block; use a GPU of architecture 80 or later.");
  problem.rows = config.rows;
  problem.panel_rows = config.panel_rows;
  problem.chunk = config.chunk;
  problem.column_blocks = config.column_blocks;
  if (args.weight_dtype == DType::bfloat16) return launch_merge<bfloat16>(args.merged_dtype, problem, config, host);
  if (args.weight_dtype == DType::float16) return launch_merge<float16>(args.merged_dtype, problem, config, host);
  return launch_merge<float>(args.merged_dtype, problem, config, host);
}

}  // namespace lors
