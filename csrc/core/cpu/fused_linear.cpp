// SPDX-License-Identifier: Apache-2.0
// fused_linear on the CPU: adapters and activations are packed once; then the threads divide the output's columns, so that
// every weight is merged by one thread, once.
#include <lors/fused_linear.h>

#include "kernels.h"
#include "pack_adapters.h"
#include "workspace.h"

namespace lors {

using namespace cpu;

Status fused_linear(const FusedLinearArgs& args, const CpuHost* host) {
  if (args.weight_dtype == DType::float64 || args.activation_dtype == DType::float64)
    return Status::error("fused_linear accumulates in float32; use merge and a float64 matmul for float64 tensors.");
  if (args.output_dtype != DType::float32 || (args.bias && args.bias_dtype != DType::float32))
    return Status::error("fused_linear takes its bias and writes its output in float32 on the CPU; convert them.");
  const KernelTable& table = kernels();
  const int64_t columns = args.input_gradient ? args.in_features : args.out_features;
  const int64_t depth = args.input_gradient ? args.out_features : args.in_features;
  if (args.tokens == 0 || columns == 0) return {};

  const PackedAdapters adapters(args, table.fused_columns, false, host);
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
  job.in_features = args.in_features;
  job.r = args.r;
  job.input_gradient = args.input_gradient;
  job.activation = static_cast<const float*>(activation.data());
  job.weight = args.weight;
  job.weight_dtype = args.weight_dtype;
  job.mask = args.mask;
  job.lora_A = static_cast<const float*>(adapters.lora_A());
  job.lora_B = static_cast<const float*>(adapters.lora_B());
  job.round_to = args.round_to;
  job.bias = static_cast<const float*>(args.bias);
  job.out = static_cast<float*>(args.output);
  const int64_t panels = (columns + table.fused_columns - 1) / table.fused_columns;
  const int64_t work_per_panel = depth * table.fused_columns * (args.tokens + args.r);
  parallel_for(host, panels, 1 + (1 << 20) / work_per_panel, [&](int64_t begin, int64_t end) {
    const Workspace scratch(host, table.fused_scratch * 4);
    table.fused_matmul(job, begin, end, static_cast<float*>(scratch.data()));
  });
  return {};
}

}  // namespace lors
