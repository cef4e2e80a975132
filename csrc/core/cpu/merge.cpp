// SPDX-License-Identifier: Apache-2.0
// merged = weight + scaling * mask o (lora_B lora_A) on the CPU: pack the adapters once, then one pass over the weight.
#include <lors/merge.h>

#include "kernels.h"
#include "pack_adapters.h"
#include "workspace.h"

namespace lors {

using namespace cpu;

Status merge(const MergeArgs& args, const CpuHost* host) {
  const int64_t N = args.out_features, K = args.in_features;
  if (N == 0 || K == 0) return {};
  const bool is_double = args.weight_dtype == DType::float64;
  if (is_double != (args.merged_dtype == DType::float64))
    return Status::error("merge writes float64 for a float64 weight only; convert the weight or ask for float64.");
  if (args.merged_dtype != DType::float32 && args.round_to != args.merged_dtype)
    return Status::error("merge can round to another type than it writes only when it writes float32.");
  const KernelTable& table = kernels();
  const PackedAdapters adapters(args, is_double ? table.merge_panel / 2 : table.merge_panel, is_double, host);
  MergeJob job;
  job.in_features = K;
  job.r = args.r;
  job.weight = args.weight;
  job.weight_dtype = args.weight_dtype;
  job.mask = args.mask;
  job.lora_A = adapters.lora_A();
  job.lora_B = adapters.lora_B();
  job.merged = args.merged;
  job.merged_dtype = args.merged_dtype;
  job.round_to = args.round_to;
  job.is_double = is_double;
  const int64_t grain = 1 + 65536 / K;  // below some ten microseconds of work a second thread does not pay
  parallel_for(host, N, grain, [&](int64_t begin, int64_t end) { table.merge(job, begin, end); });
  return {};
}

}  // namespace lors
