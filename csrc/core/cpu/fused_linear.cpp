// SPDX-License-Identifier: Apache-2.0
// fused_linear on the CPU. A few tokens: each tile of the weight is merged and multiplied in registers, rows divided among the
// threads. More: adapters and activations are packed once, then the threads divide the output's columns, so that every weight
// is merged by one thread, once.
#include <algorithm>

#include "pack_adapters.h"
#include "with_table.h"
#include "workspace.h"

namespace lors {
namespace cpu {
namespace {

// Without an adapter a value of the rounded type already needs no rounding.
MergeJob job_of(const FusedLinearArgs& args, const PackedAdapters& adapters, const PackedGrid& grid) {
  MergeJob job = merge_job(args, adapters, grid);
  if (args.r == 0 && job.steps.grid == Grid::none && args.weight_dtype == args.round_to) job.round_to = DType::float32;
  return job;
}

void dot(const KernelTable& table, const FusedLinearArgs& args, const CpuHost* host) {
  const int64_t T = args.tokens, N = args.out_features, K = args.in_features;
  const PackedAdapters adapters(table, args, table.merge_panel, false, host);
  const PackedGrid grid(table, args, host);
  DotJob job;
  job.tokens = T;
  job.out_features = N;
  job.stride = (K + kDotColumns - 1) / kDotColumns * kDotColumns;
  const Workspace activation(host, T * job.stride * 4), limits(host, T * 4), cursors(host, args.row_offsets ? N * 8 : 0);
  job.src = args.activation;
  job.src_dtype = args.activation_dtype;
  job.activation = activation.data();
  job.limits = static_cast<float*>(limits.data());
  job.weight = job_of(args, adapters, grid);
  table.pack_dot(job, 0, T);
  job.weight.cursors = static_cast<int64_t*>(cursors.data());
  if (args.row_offsets) std::copy_n(args.row_offsets, N, job.weight.cursors);
  job.bias = static_cast<const float*>(args.bias);
  job.out = static_cast<float*>(args.output);
  parallel_for(host, N, 1 + 65536 / std::max<int64_t>(K, 1), [&](int64_t begin, int64_t end) {
    const Workspace sums(host, (end - begin) * T * table.lanes * 4);
    table.dot(job, begin, end, static_cast<float*>(sums.data()));
  });
}

}  // namespace

Status fused_linear_with(const KernelTable& table, const FusedLinearArgs& args, const CpuHost* host) {
  if (args.experts.offsets)
    return Status::error("fused_linear takes one expert on the CPU, and was given offsets; call it for the rows of each.");
  const bool is_quantized = args.quantization.grid != Grid::none;
  if (is_quantized && (args.quantization.requantize_steps != 0 || args.round_to == DType::float16))
    return Status::error("fused_linear of quantised codes rounds to bfloat16 or float32, and requantises nothing; use merge.");
  if ((!is_quantized && args.weight_dtype == DType::float64) || args.activation_dtype == DType::float64)
    return Status::error("fused_linear accumulates in float32; use merge and a float64 matmul for float64 tensors.");
  if (args.output_dtype != DType::float32 || (args.bias && args.bias_dtype != DType::float32))
    return Status::error("fused_linear takes its bias and writes its output in float32 on the CPU; convert them.");
  const int64_t columns = args.input_gradient ? args.in_features : args.out_features;
  const int64_t depth = args.input_gradient ? args.out_features : args.in_features;
  if (args.tokens == 0 || columns == 0) return {};
  if (!args.input_gradient && args.tokens <= kFewTokens) {
    dot(table, args, host);
    return {};
  }

  const PackedAdapters adapters(table, args, table.fused_columns, false, host);
  const PackedGrid grid(table, args, host);
  const int64_t token_panels = (args.tokens + table.fused_rows - 1) / table.fused_rows;
  const Workspace activation(host, token_panels * table.fused_rows * depth * 4);
  PackActivationJob pack;
  pack.tokens = args.tokens;
  pack.depth = depth;
  pack.src = args.activation;
  pack.src_dtype = args.activation_dtype;
  pack.dst = static_cast<float*>(activation.data());
  parallel_for(host, token_panels, 1 + 8192 / depth,
               [&](int64_t begin, int64_t end) { table.pack_activation(pack, begin, end); });

  FusedJob job;
  job.tokens = args.tokens;
  job.out_features = args.out_features;
  job.input_gradient = args.input_gradient;
  job.activation = static_cast<const float*>(activation.data());
  job.weight = job_of(args, adapters, grid);
  job.row_offsets = args.row_offsets;
  job.bias = static_cast<const float*>(args.bias);
  job.out = static_cast<float*>(args.output);
  const int64_t panels = (columns + table.fused_columns - 1) / table.fused_columns;
  const int64_t work_per_panel = depth * table.fused_columns * (args.tokens + args.r);
  parallel_for(host, panels, 1 + (1 << 20) / work_per_panel, [&](int64_t begin, int64_t end) {
    const Workspace scratch(host, table.fused_scratch * 4), cursors(host, args.row_offsets ? args.out_features * 8 : 0);
    table.fused_matmul(job, begin, end, static_cast<float*>(scratch.data()), static_cast<int64_t*>(cursors.data()));
  });
  return {};
}

}  // namespace cpu

Status fused_linear(const FusedLinearArgs& args, const CpuHost* host) {
  return cpu::fused_linear_with(cpu::kernels(), args, host);
}

}  // namespace lors
