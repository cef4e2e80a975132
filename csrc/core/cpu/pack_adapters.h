// SPDX-License-Identifier: Apache-2.0
// lora_A as column panels and scaling * lora_B, in the accumulation type: the adapters as the merge kernels read them.
#pragma once

#include "kernels.h"
#include "workspace.h"

namespace lors::cpu {

class PackedAdapters {
 public:
  // `args` is a MergeArgs or a FusedLinearArgs; `panel` the columns of one panel of lora_A.
  template <typename Args>
  PackedAdapters(const Args& args, int64_t panel, bool is_double, const CpuHost* host)
      : lora_A_(host, (args.in_features + panel - 1) / panel * panel * args.r * (is_double ? 8 : 4)),
        lora_B_(host, args.out_features * args.r * (is_double ? 8 : 4)) {
    const int64_t K = args.in_features, r = args.r, size = is_double ? 8 : 4;
    if (r == 0) return;
    parallel_for(host, (K + panel - 1) / panel, 1 + 16384 / (panel * r), [&](int64_t begin, int64_t end) {
      for (int64_t q = begin; q < end; ++q) {
        PackJob job;
        job.src = static_cast<const char*>(args.lora_A) + q * panel * dtype_size(args.lora_A_dtype);
        job.src_dtype = args.lora_A_dtype;
        job.columns = K - q * panel < panel ? K - q * panel : panel;
        job.row_stride = K;
        job.column_stride = 1;
        job.width = panel;
        job.is_double = is_double;
        job.dst = static_cast<char*>(lora_A_.data()) + q * panel * r * size;
        kernels().pack(job, 0, r);
      }
    });
    PackJob job;
    job.src = args.lora_B;
    job.src_dtype = args.lora_B_dtype;
    job.columns = job.width = job.row_stride = r;
    job.column_stride = 1;
    job.scale = args.scaling;
    job.is_double = is_double;
    job.dst = lora_B_.data();
    parallel_for(host, args.out_features, 1 + 16384 / r, [&](int64_t begin, int64_t end) { kernels().pack(job, begin, end); });
  }

  const void* lora_A() const { return lora_A_.data(); }  // Acc [ceil(K/panel), r, panel], zero-padded
  const void* lora_B() const { return lora_B_.data(); }  // Acc [N, r]

 private:
  Workspace lora_A_, lora_B_;
};

// The weight and its adapters as the kernels take them, from MergeArgs or FusedLinearArgs; cursors and result are left out.
template <typename Args>
MergeJob merge_job(const Args& args, const PackedAdapters& adapters) {
  MergeJob job;
  job.in_features = args.in_features;
  job.r = args.r;
  job.weight_layout = args.weight_layout;
  job.weight = args.weight;
  job.weight_dtype = args.weight_dtype;
  job.mask = args.mask;
  job.metadata = args.metadata;
  job.value_count = args.row_offsets ? args.row_offsets[args.out_features] : 0;
  job.lora_A = adapters.lora_A();
  job.lora_B = adapters.lora_B();
  job.round_to = args.round_to;
  return job;
}

}  // namespace lors::cpu
