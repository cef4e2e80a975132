// SPDX-License-Identifier: Apache-2.0
// merged = weight + scaling * mask o (lora_B lora_A) on the CPU, from every layout to dense and from 2:4 values to 2:4 values:
// pack the adapters once, then one pass over the weight.
#include <lors/sparse24.h>

#include <algorithm>

#include "pack_adapters.h"
#include "with_table.h"
#include "workspace.h"

namespace lors {
namespace cpu {
namespace {

// Rows that are merged, drawn and rounded before the next: a multiple of every table's tile.
constexpr int64_t kDrawRows = 24;

// A few rows at a time: merged unrounded, then drawn, requantised or rounded while they are in a cache.
void merge_and_draw(const KernelTable& table, const MergeArgs& args, MergeJob job, const CpuHost* host, int64_t begin,
                    int64_t end) {
  const int64_t K = args.in_features, size = dtype_size(args.merged_dtype);
  const bool in_place = args.merged_dtype == DType::float64 || args.merged_dtype == DType::float32;
  const bool from_codes = args.draws.noise && args.weight_layout == Layout::sparse24;
  const Workspace rows(host, in_place ? 0 : kDrawRows * K * 4), bits(host, from_codes ? kDrawRows * mask_words(K) * 4 : 0);
  DrawJob draw;
  draw.in_features = K;
  draw.draws = args.draws;
  draw.steps = job.steps;
  draw.dst_dtype = args.merged_dtype;
  draw.round_to = args.round_to;
  draw.kept_where_size = dtype_size(args.weight_dtype);
  if (!in_place) job.merged_dtype = DType::float32;
  job.round_to = job.merged_dtype;
  for (int64_t n = begin; n < end; n += kDrawRows) {
    draw.first_row = n;
    draw.rows = std::min(kDrawRows, end - n);
    if (from_codes) {
      const uint8_t* metadata = args.metadata + n * sparse24_metadata_bytes(K);
      uint32_t* mask = static_cast<uint32_t*>(bits.data());
      (void)sparse24_mask({draw.rows, K, metadata, mask}, static_cast<const CpuHost*>(nullptr));  // it refuses nothing
      draw.kept = mask;
    } else if (args.mask) {
      draw.kept = args.mask + n * mask_words(K);
    } else {
      draw.kept_where = static_cast<const char*>(args.weight) + n * K * draw.kept_where_size;
    }
    draw.dst = static_cast<char*>(args.merged) + n * K * size;
    draw.src = in_place ? draw.dst : rows.data();
    // The kernel counts rows from the result's first.
    if (!in_place) job.merged = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(rows.data()) - uintptr_t(n * K * 4));
    table.merge(job, n, n + draw.rows);
    table.draw(draw);
  }
}

}  // namespace

Status merge_with(const KernelTable& table, const MergeArgs& args, const CpuHost* host) {
  const int64_t N = args.out_features, K = args.in_features;
  if (N == 0 || K == 0) return {};
  const Quantization& quantization = args.quantization;
  const bool is_quantized = quantization.grid != Grid::none, requantizes = is_quantized && quantization.requantize_steps != 0;
  const bool is_double = !is_quantized && args.weight_dtype == DType::float64;
  if (is_double != (args.merged_dtype == DType::float64))
    return Status::error("merge writes float64 for a float64 weight only; convert the weight or ask for float64.");
  if (args.merged_dtype != DType::float32 && args.round_to != args.merged_dtype)
    return Status::error("merge can round to another type than it writes only when it writes float32.");
  if (Status status = is_quantized ? check_quantized_merge(args) : check_merged_layout(args); !status.ok()) return status;
  const bool is_bitmap = args.weight_layout == Layout::bitmap;
  const PackedAdapters adapters(table, args, table.merge_panel / (is_double ? 2 : 1), is_double, host);
  const Workspace cursors(host, is_bitmap ? N * 8 : 0);
  if (is_bitmap) std::copy_n(args.row_offsets, N, static_cast<int64_t*>(cursors.data()));
  const PackedGrid grid(table, args, host);
  MergeJob job = merge_job(args, adapters, grid);
  job.merged_layout = args.merged_layout;
  job.cursors = static_cast<int64_t*>(cursors.data());
  job.merged = args.merged;
  job.merged_dtype = args.merged_dtype;
  job.is_double = is_double;
  // Below some ten microseconds of work a second thread does not pay.
  const bool draws = args.draws.noise || (args.draws.rounds && dtype_size(args.round_to) == 2) || requantizes ||
                     (is_quantized && args.round_to != DType::float32 && args.merged_dtype != DType::bfloat16);
  parallel_for(host, N, 1 + 65536 / K, [&](int64_t begin, int64_t end) {
    draws ? merge_and_draw(table, args, job, host, begin, end) : table.merge(job, begin, end);
  });
  return {};
}

}  // namespace cpu

Status merge(const MergeArgs& args, const CpuHost* host) { return cpu::merge_with(cpu::kernels(), args, host); }

}  // namespace lors
