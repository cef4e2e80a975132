// SPDX-License-Identifier: Apache-2.0
// Launches the merge: checks what the kernel cannot do, asks merge_config for the tiling, picks the kernel by layouts and
// dtypes.
#include "merge.cuh"

#include <lors/merge.h>

#include "launch.h"
#include "merge_before.cuh"
#include "merge_fast_config.h"
#include "merge_quantized.cuh"

namespace lors {
namespace {

using namespace cuda;

template <typename Body>
Status with_type(DType dtype, const Body& body) {
  if (dtype == DType::bfloat16) return body(bfloat16{});
  if (dtype == DType::float16) return body(float16{});
  return body(float{});
}

template <template <typename, typename> typename Source, template <typename, typename> typename Sink, typename W, typename Out>
Status run(const MergeProblem& problem, const MergeConfig& config, const CudaHost& host) {
  return launch("merge", merge_kernel<Source, Sink, W, Out>, dim3(static_cast<unsigned>(config.blocks)),
                dim3(static_cast<unsigned>(config.columns)), config.shared_bytes, host, problem);
}

template <template <typename, typename> typename Source>
Status run_to_dense(const MergeArgs& args, const MergeProblem& problem, const MergeConfig& config, const CudaHost& host) {
  return with_type(args.weight_dtype, [&](auto w) {
    return with_type(args.merged_dtype,
                     [&](auto out) { return run<Source, DenseSink, decltype(w), decltype(out)>(problem, config, host); });
  });
}

}  // namespace

Status cuda::count_before(MergeProblem& p, void* scratch, int columns, const CudaHost& host, const ExpertRows& experts) {
  constexpr int64_t kRows = kBeforeThreads / kWarp;
  const int64_t rows = p.out_features * experts.count;
  uint32_t* const before = static_cast<uint32_t*>(scratch);
  p.before = before;
  return launch("merge", bitmap_before_kernel, dim3(static_cast<unsigned>((rows + kRows - 1) / kRows)), dim3(kBeforeThreads), 0,
                host, p, before, columns, experts);
}

Status merge(const MergeArgs& args, const CudaHost& host) {
  const int64_t N = args.out_features, K = args.in_features;
  const bool from_sparse24 = args.weight_layout == Layout::sparse24, to_sparse24 = args.merged_layout == Layout::sparse24;
  if (N == 0 || K == 0) return {};
  const bool quantized = args.quantization.grid != Grid::none;
  const DType weight_dtype = quantized ? args.quantization.scales_dtype : args.weight_dtype;
  for (const DType dtype : {weight_dtype, args.merged_dtype, args.lora_A_dtype, args.lora_B_dtype})
    if (dtype == DType::float64)
      return Status::error(
          "merge on CUDA takes float32, bfloat16 and float16, and was given float64; convert the tensors or "
          "move them to the CPU.");
  if (args.round_to != args.merged_dtype)
    return Status::error("merge on CUDA rounds to the dtype it writes; ask for the same round_to and merged_dtype.");
  if (Status status = quantized ? check_quantized_merge(args) : check_merged_layout(args); !status.ok()) return status;
  if (args.merged_layout == Layout::bitmap)
    return Status::error("merge on CUDA writes a dense weight or 2:4 values, and was asked for a bitmap's; merge to dense.");

  DeviceLimits limits;
  if (Status status = device_limits(limits); !status.ok()) return status;
  const int terms_A = split_terms(args.lora_A_dtype), terms_B = split_terms(args.lora_B_dtype);
  // A quantised weight always has an index. Its codes count as a byte each; they do not go through shared memory.
  const Layout tile_layout = quantized && args.weight_layout == Layout::dense ? Layout::sparse24 : args.weight_layout;
  const int value_bytes = quantized ? 1 : static_cast<int>(dtype_size(args.weight_dtype));
  const MergeConfig fast = merge_fast_config(args, terms_A, terms_B, limits);
  const MergeConfig config =
      fast.columns ? fast : merge_config(N, K, args.r, terms_A, terms_B, tile_layout, value_bytes, limits);
  if (config.columns == 0 || config.blocks > 0x7fffffff)
    return Status::error("merge found no tiling for a weight of [" + std::to_string(N) + ", " + std::to_string(K) +
                         "] on a device with " + std::to_string(limits.shared_bytes) +
                         " bytes of shared memory per block; use a GPU of architecture 80 or later.");
  MergeProblem p = merge_problem(args, config);
  p.merged = args.merged;
  p.merged_vectors = has_vectors(args.merged, K);
  p.draws = args.draws;

  const Scratch before(host, args.weight_layout == Layout::bitmap ? N * config.column_blocks : 0);
  if (before.data())
    if (Status status = count_before(p, before.data(), config.columns, host); !status.ok()) return status;
  if (fast.columns) return merge_fast(args, p, config, host);
  if (quantized)
    return with_type(args.merged_dtype,
                     [&](auto out) { return run<QuantizedSource, DenseSink, uint8_t, decltype(out)>(p, config, host); });
  if (to_sparse24)
    return with_type(args.weight_dtype,
                     [&](auto w) { return run<Sparse24Source, Sparse24Sink, decltype(w), decltype(w)>(p, config, host); });
  if (args.weight_layout == Layout::dense) return run_to_dense<DenseSource>(args, p, config, host);
  if (from_sparse24) return run_to_dense<Sparse24Source>(args, p, config, host);
  return run_to_dense<BitmapSource>(args, p, config, host);
}

}  // namespace lors
