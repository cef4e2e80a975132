// SPDX-License-Identifier: Apache-2.0
// lora_A as column panels and scaling * lora_B, in the accumulation type: the adapters as the merge kernels read them. Or,
// where both are bfloat16 and the processor multiplies bfloat16 pairs, neighbouring ranks in pairs, and the scaling by itself.
// And the grid of a quantised weight. What is requantised has no pairs: whether factors may be in pairs is asked of all of a
// call's rows, so that a panel of rows could come to lie on other codes than the whole.
#pragma once

#include <algorithm>

#include "in_pairs.h"
#include "kernels.h"
#include "workspace.h"

namespace lors::cpu {

class PackedAdapters {
 public:
  // `args` is a MergeArgs or a FusedLinearArgs; `panel` the columns of one panel of lora_A.
  template <typename Args>
  PackedAdapters(const KernelTable& table, const Args& args, int64_t panel, bool is_double, const CpuHost* host)
      : pairs(!is_double && args.r % 2 == 0 && args.quantization.requantize_steps == 0 &&
              in_pairs(table, {args.lora_A, args.lora_A_dtype, args.r * args.in_features},
                       {args.lora_B, args.lora_B_dtype, args.r * args.out_features}, host)),
        r(pairs ? args.r / 2 : args.r),
        lora_A_(host, (args.in_features + panel - 1) / panel * panel * r * (is_double ? 8 : 4)),
        lora_B_(host, args.out_features * r * (is_double ? 8 : 4)) {
    const int64_t K = args.in_features, size = is_double ? 8 : 4, ranks = pairs ? 2 : 1;
    if (r == 0) return;
    parallel_for(host, (K + panel - 1) / panel, 1 + 16384 / (panel * r), [&](int64_t begin, int64_t end) {
      for (int64_t q = begin; q < end; ++q) {
        PackJob job;
        job.src = static_cast<const char*>(args.lora_A) + q * panel * dtype_size(args.lora_A_dtype);
        job.src_dtype = args.lora_A_dtype;
        job.columns = K - q * panel < panel ? K - q * panel : panel;
        job.row_stride = ranks * K;
        job.column_stride = 1;
        job.pair_stride = pairs ? K : 0;
        job.width = panel;
        job.is_double = is_double;
        job.dst = static_cast<char*>(lora_A_.data()) + q * panel * r * size;
        table.pack(job, 0, r);
      }
    });
    PackJob job;
    job.src = args.lora_B;
    job.src_dtype = args.lora_B_dtype;
    job.columns = job.width = r;
    job.row_stride = args.r;
    job.column_stride = ranks;
    job.pair_stride = pairs ? 1 : 0;
    job.scale = args.scaling;
    job.is_double = is_double;
    job.dst = lora_B_.data();
    parallel_for(host, args.out_features, 1 + 16384 / r, [&](int64_t begin, int64_t end) { table.pack(job, begin, end); });
  }

  const void* lora_A() const { return lora_A_.data(); }  // Acc [ceil(K/panel), r, panel], zero-padded
  const void* lora_B() const { return lora_B_.data(); }  // Acc [N, r]

  const bool pairs;
  const int64_t r;  // ranks, or pairs of them

 private:
  Workspace lora_A_, lora_B_;
};

// The scales and zero points of a quantised weight as the kernels read them; of others nothing.
class PackedGrid {
 public:
  // `args` is a MergeArgs or a FusedLinearArgs.
  template <typename Args>
  PackedGrid(const KernelTable& table, const Args& args, const CpuHost* host)
      : groups_(args.quantization.grid == Grid::none ? 0 : args.in_features / args.quantization.group),
        scales_(host, (args.out_features * groups_ + kBeyond) * 4),
        zeros_(host, (args.out_features * groups_ + kBeyond) * 4) {
    if (groups_ == 0) return;
    const Quantization& quantization = args.quantization;
    steps.grid = quantization.grid;
    steps.scales = static_cast<const float*>(scales_.data());
    steps.zeros = static_cast<const float*>(zeros_.data());
    steps.groups = groups_;
    if (groups_ == 1) steps.shift = 62;  // more than any column has
    while (groups_ > 1 && int64_t{1} << steps.shift < quantization.group) ++steps.shift;
    steps.requantize_steps = quantization.requantize_steps;
    steps.dither_seed = quantization.dither_seed;
    steps.first_row = quantization.first_row;
    for (const Workspace* packed : {&scales_, &zeros_})
      std::fill_n(static_cast<float*>(packed->data()) + args.out_features * groups_, kBeyond, 0.0f);
    PackJob job;
    job.src = quantization.scales;
    job.src_dtype = quantization.scales_dtype;
    job.columns = job.row_stride = job.width = groups_;
    job.column_stride = 1;
    job.dst = scales_.data();
    parallel_for(host, args.out_features, 1 + 16384 / groups_, [&](int64_t begin, int64_t end) {
      table.pack(job, begin, end);
      float* zeros = static_cast<float*>(zeros_.data());
      for (int64_t i = begin * groups_; i < end * groups_; ++i)
        zeros[i] = quantization.zero_points ? float(quantization.zero_points[i]) : 0.0f;
    });
  }

  GridSteps steps;

 private:
  // A tile reads the groups of all of its columns, also where the weight has ended; there activations are 0, so that any
  // number will do.
  static constexpr int64_t kBeyond = 2;
  int64_t groups_;
  Workspace scales_, zeros_;
};

// The weight and its adapters as the kernels take them, from MergeArgs or FusedLinearArgs; cursors and result are left out.
template <typename Args>
MergeJob merge_job(const Args& args, const PackedAdapters& adapters, const PackedGrid& grid) {
  MergeJob job;
  job.in_features = args.in_features;
  job.weight_layout = args.weight_layout;
  job.weight = args.weight;
  job.weight_dtype = args.weight_dtype;
  job.mask = args.mask;
  job.metadata = args.metadata;
  job.value_count = args.row_offsets ? args.row_offsets[args.out_features] : 0;
  job.steps = grid.steps;
  job.r = adapters.r;
  job.pairs = adapters.pairs;
  job.lora_A = adapters.lora_A();
  job.lora_B = adapters.lora_B();
  job.scaling = float(args.scaling);
  job.round_to = args.round_to;
  return job;
}

}  // namespace lors::cpu
