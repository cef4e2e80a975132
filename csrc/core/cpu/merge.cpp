// SPDX-License-Identifier: Apache-2.0
// merged = weight + scaling * mask o (lora_B lora_A) on the CPU: pack the adapters once, then one pass over the weight.
#include <lors/merge.h>

#include "kernels.h"
#include "workspace.h"

namespace lors {

namespace cpu {

Status merge(const MergeArgs& args, Stream stream) {
  const int64_t N = args.out_features, K = args.in_features, r = args.r;
  if (N == 0 || K == 0) return {};
  const bool is_double = args.weight_dtype == DType::float64;
  if (is_double != (args.merged_dtype == DType::float64))
    return Status::error("merge writes float64 for a float64 weight only; convert the weight or ask for float64.");
  if (args.merged_dtype != DType::float32 && args.round_to != args.merged_dtype)
    return Status::error("merge can round to another type than it writes only when it writes float32.");
  const KernelTable& table = kernels();
  const int64_t size = is_double ? 8 : 4;
  const int64_t panel = is_double ? table.merge_panel / 2 : table.merge_panel;
  const int64_t panels = (K + panel - 1) / panel;
  Workspace lora_A(panels * panel * r * size), lora_B(N * r * size);

  parallel_for(stream, panels, 16, [&](int64_t begin, int64_t end) {
    for (int64_t q = begin; q < end; ++q) {
      PackJob job;
      job.src = static_cast<const char*>(args.lora_A) + q * panel * dtype_size(args.lora_A_dtype);
      job.src_dtype = args.lora_A_dtype;
      job.rows = r;
      job.columns = K - q * panel < panel ? K - q * panel : panel;
      job.row_stride = K;
      job.column_stride = 1;
      job.width = panel;
      job.is_double = is_double;
      job.dst = static_cast<char*>(lora_A.data()) + q * panel * r * size;
      table.pack(job, 0, r);
    }
  });
  PackJob pack_B;
  pack_B.src = args.lora_B;
  pack_B.src_dtype = args.lora_B_dtype;
  pack_B.rows = N;
  pack_B.columns = pack_B.width = pack_B.row_stride = r;
  pack_B.column_stride = 1;
  pack_B.scale = args.scaling;
  pack_B.is_double = is_double;
  pack_B.dst = lora_B.data();

  MergeJob job;
  job.in_features = K;
  job.r = r;
  job.weight = args.weight;
  job.weight_dtype = args.weight_dtype;
  job.mask = args.mask;
  job.lora_A = lora_A.data();
  job.lora_B = lora_B.data();
  job.merged = args.merged;
  job.merged_dtype = args.merged_dtype;
  job.round_to = args.round_to;
  job.is_double = is_double;
  const int64_t grain = 1 + 65536 / K;  // below some ten microseconds of work a second thread does not pay
  parallel_for(stream, N, grain, [&](int64_t begin, int64_t end) {
    table.pack(pack_B, begin, end);
    table.merge(job, begin, end);
  });
  return {};
}

}  // namespace cpu

Status merge(const MergeArgs& args, Device device, Stream stream) {
  if (device.type == DeviceType::cpu) return cpu::merge(args, stream);
  return Status::error("lors::merge has no CUDA kernel in this build; move the tensors to the CPU.");
}

}  // namespace lors
