// SPDX-License-Identifier: Apache-2.0
// merged = weight + scaling * mask o (lora_B lora_A) on the CPU, from every layout to dense and from 2:4 values to 2:4 values:
// pack the adapters once, then one pass over the weight.
#include <algorithm>

#include "pack_adapters.h"
#include "with_table.h"
#include "workspace.h"

namespace lors {
namespace cpu {

Status merge_with(const KernelTable& table, const MergeArgs& args, const CpuHost* host) {
  const int64_t N = args.out_features, K = args.in_features;
  if (N == 0 || K == 0) return {};
  const bool is_double = args.weight_dtype == DType::float64;
  if (is_double != (args.merged_dtype == DType::float64))
    return Status::error("merge writes float64 for a float64 weight only; convert the weight or ask for float64.");
  if (args.merged_dtype != DType::float32 && args.round_to != args.merged_dtype)
    return Status::error("merge can round to another type than it writes only when it writes float32.");
  if (Status status = check_merged_layout(args); !status.ok()) return status;
  const bool is_bitmap = args.weight_layout == Layout::bitmap;
  const PackedAdapters adapters(table, args, table.merge_panel / (is_double ? 2 : 1), is_double, host);
  const Workspace cursors(host, is_bitmap ? N * 8 : 0);
  if (is_bitmap) std::copy_n(args.row_offsets, N, static_cast<int64_t*>(cursors.data()));
  MergeJob job = merge_job(args, adapters);
  job.merged_layout = args.merged_layout;
  job.cursors = static_cast<int64_t*>(cursors.data());
  job.merged = args.merged;
  job.merged_dtype = args.merged_dtype;
  job.is_double = is_double;
  // Below some ten microseconds of work a second thread does not pay.
  parallel_for(host, N, 1 + 65536 / K, [&](int64_t begin, int64_t end) { table.merge(job, begin, end); });
  return {};
}

}  // namespace cpu

Status merge(const MergeArgs& args, const CpuHost* host) { return cpu::merge_with(cpu::kernels(), args, host); }

}  // namespace lors
