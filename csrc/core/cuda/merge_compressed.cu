// SPDX-License-Identifier: Apache-2.0
// Launches the merges of compressed weights: cut into blocks by merge_config, as the dense one.
#include "merge_compressed.cuh"

#include <lors/sparse24.h>

#include "launch.h"
#include "merge_compressed.h"

namespace lors {
namespace {

using namespace cuda;

struct Launch {
  CompressedProblem problem{};
  MergeConfig config;
};

// Everything but the values, the result and a bitmap's `before`. N and K are not 0.
template <typename Args>
Status describe(Launch& launch, const char* name, const Args& args, Layout layout, DType dtype, const void* index) {
  const int64_t N = args.out_features, K = args.in_features;
  DeviceLimits limits;
  if (Status status = device_limits(limits); !status.ok()) return status;
  const MergeConfig config = merge_config(N, K, args.r, split_terms(args.lora_A_dtype), split_terms(args.lora_B_dtype), layout,
                                          static_cast<int>(dtype_size(dtype)), limits);
  if (config.columns == 0 || config.blocks > 0x7fffffff)
    return Status::error(std::string(name) + " found no way to cut a weight of [" + std::to_string(N) + ", " +
                         std::to_string(K) + "] for a device with " + std::to_string(limits.shared_bytes) +
                         " bytes of shared memory per block; use a GPU of architecture 80 or later.");
  CompressedProblem& p = launch.problem;
  p.merge.lora_A = matrix(args.lora_A, args.lora_A_dtype, args.r, K);
  p.merge.lora_B = matrix(args.lora_B, args.lora_B_dtype, N, args.r);
  p.merge.out_features = N;
  p.merge.in_features = K;
  p.merge.scaling = static_cast<float>(args.scaling);
  p.merge.rows = config.rows;
  p.merge.panel_rows = config.panel_rows;
  p.merge.chunk = config.chunk;
  p.merge.column_blocks = config.column_blocks;
  p.merge.mask_words = mask_words(K);
  p.index = static_cast<const uint8_t*>(index);
  p.index_pitch = layout == Layout::bitmap ? 4 * mask_words(K) : sparse24_metadata_bytes(K);
  p.index_vectors = p.index_pitch % 16 == 0 && reinterpret_cast<uintptr_t>(index) % 16 == 0;
  p.tile_at = config.tile_at;
  p.tile_pitch = merge_tile_pitch(config.columns);
  launch.config = config;
  return {};
}

template <typename W, typename Out, bool kBitmap, bool kValues>
Status run(const char* name, const Launch& l, const CudaHost& host) {
  return launch(name, merge_compressed_kernel<W, Out, kBitmap, kValues>, dim3(static_cast<unsigned>(l.config.blocks)),
                dim3(static_cast<unsigned>(l.config.columns)), l.config.shared_bytes, host, l.problem);
}

template <typename W, bool kBitmap>
Status run(DType merged, const char* name, const Launch& l, const CudaHost& host) {
  if (merged == DType::bfloat16) return run<W, bfloat16, kBitmap, false>(name, l, host);
  if (merged == DType::float16) return run<W, float16, kBitmap, false>(name, l, host);
  return run<W, float, kBitmap, false>(name, l, host);
}

template <bool kBitmap>
Status run(const MergeArgs& args, const char* name, const Launch& l, const CudaHost& host) {
  if (args.weight_dtype == DType::bfloat16) return run<bfloat16, kBitmap>(args.merged_dtype, name, l, host);
  if (args.weight_dtype == DType::float16) return run<float16, kBitmap>(args.merged_dtype, name, l, host);
  return run<float, kBitmap>(args.merged_dtype, name, l, host);
}

Status refuse_float64(const char* name) {
  return Status::error(std::string(name) +
                       " on CUDA takes float32, bfloat16 and float16, and was given float64; convert the tensors or move them "
                       "to the CPU.");
}

}  // namespace

Status cuda::merge_compressed(const MergeArgs& args, const CudaHost& host) {
  const int64_t N = args.out_features, K = args.in_features;
  if (N == 0 || K == 0) return {};
  for (const DType dtype : {args.weight_dtype, args.merged_dtype, args.lora_A_dtype, args.lora_B_dtype})
    if (dtype == DType::float64) return refuse_float64("merge");
  if (args.round_to != args.merged_dtype)
    return Status::error("merge on CUDA rounds to the dtype it writes; ask for the same round_to and merged_dtype.");
  const bool bitmap = args.weight_layout == Layout::bitmap;
  Launch l;
  const Status status = describe(l, "merge", args, args.weight_layout, args.weight_dtype,
                                 bitmap ? static_cast<const void*>(args.mask) : args.metadata);
  if (!status.ok()) return status;
  CompressedProblem& p = l.problem;
  p.merge.weight = args.weight;
  p.merge.mask = args.mask;
  p.merge.merged = args.merged;
  p.merge.weight_vectors = K % 8 == 0 && reinterpret_cast<uintptr_t>(args.weight) % 16 == 0;
  p.merge.merged_vectors = has_vectors(args.merged, K);
  p.row_offsets = args.row_offsets;
  if (!bitmap) return run<false>(args, "merge", l, host);

  const Scratch before(host, N * l.config.column_blocks);
  p.before = reinterpret_cast<uint32_t*>(before.data());
  constexpr int64_t kRows = kBeforeThreads / kWarp;
  if (Status s = launch("merge", bitmap_before_kernel, dim3(static_cast<unsigned>((N + kRows - 1) / kRows)),
                        dim3(kBeforeThreads), 0, host, p, const_cast<uint32_t*>(p.before), l.config.columns);
      !s.ok())
    return s;
  return run<true>(args, "merge", l, host);
}

Status sparse24_merge(const Sparse24MergeArgs& args, const CudaHost& host) {
  const int64_t N = args.out_features, K = args.in_features;
  if (N == 0 || K == 0) return {};
  for (const DType dtype : {args.dtype, args.lora_A_dtype, args.lora_B_dtype})
    if (dtype == DType::float64) return refuse_float64("sparse24_merge");
  Launch l;
  if (Status status = describe(l, "sparse24_merge", args, Layout::sparse24, args.dtype, args.metadata); !status.ok())
    return status;
  CompressedProblem& p = l.problem;
  p.merge.weight = args.values;
  p.merge.merged = args.merged_values;
  p.merge.weight_vectors = K % 8 == 0 && reinterpret_cast<uintptr_t>(args.values) % 16 == 0;
  p.merge.merged_vectors = K % 8 == 0 && reinterpret_cast<uintptr_t>(args.merged_values) % 16 == 0;
  if (args.dtype == DType::bfloat16) return run<bfloat16, bfloat16, false, true>("sparse24_merge", l, host);
  if (args.dtype == DType::float16) return run<float16, float16, false, true>("sparse24_merge", l, host);
  return run<float, float, false, true>("sparse24_merge", l, host);
}

}  // namespace lors
