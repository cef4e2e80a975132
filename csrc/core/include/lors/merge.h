// SPDX-License-Identifier: Apache-2.0
// merged[n, k] = kept[n, k] ? weight[n, k] + scaling * sum_r lora_B[n, r] * lora_A[r, k] : +0     (arXiv 2501.08582, eq. 3)
// fp32 accumulation (float64 for a float64 weight), one rounding, to nearest or by chance; and noise on what is kept, if asked
// for.
#pragma once

#include <lors/quantization.h>
#include <lors/random.h>
#include <lors/status.h>
#include <lors/types.h>

#include <string>

namespace lors {

struct MergeArgs {
  int64_t out_features = 0;  // N
  int64_t in_features = 0;   // K
  int64_t r = 0;             // 0: no adapter, and lora_A and lora_B null: the stored weight is decompressed
  Layout weight_layout = Layout::dense;
  const void* weight = nullptr;  // frozen; dense: [N, K] row-major; 2:4: values [N, K/2]; bitmap: values [row_offsets[N]]
  DType weight_dtype = DType::float32;
  // [N, ceil(K/32)] bits, 1 = kept; dense: null: kept where weight != 0 (-0.0 counts as zero); 2:4: null; bitmap: its bits
  const uint32_t* mask = nullptr;
  const uint8_t* metadata = nullptr;     // 2:4: [N, ceil(K/8)], valid; else null
  const int64_t* row_offsets = nullptr;  // bitmap: [N + 1], valid; else null
  const void* lora_A = nullptr;          // [r, K] row-major
  DType lora_A_dtype = DType::float32;
  const void* lora_B = nullptr;  // [N, r] row-major
  DType lora_B_dtype = DType::float32;
  double scaling = 1.0;
  // dense; or the layout of a compressed weight, in its dtype: the values alone, for metadata and bits stay the same. Bit for
  // bit what compressing the dense result with this mask gives.
  Layout merged_layout = Layout::dense;
  void* merged = nullptr;  // overwritten whole; dense: [N, K] row-major; else values like `weight`, or `weight` itself
  DType merged_dtype = DType::float32;
  // The type each value is rounded to, once. It is merged_dtype, or a 16-bit type held in a float32 `merged`: a
  // float32 matmul then sees exactly the values that a 16-bit merged weight has.
  DType round_to = DType::float32;
  Draws draws;                // into a dense result only
  Quantization quantization;  // of `weight`; weight_dtype is not read then
};

inline Status check_merged_layout(const MergeArgs& args) {
  if (args.merged_layout != Layout::dense && (args.draws.rounds || args.draws.noise))
    return Status::error("merge draws random numbers for a dense result only; merge to dense, and compress that.");
  if (args.merged_layout == Layout::dense || (args.merged_layout == args.weight_layout &&
                                              args.merged_dtype == args.weight_dtype && args.round_to == args.weight_dtype))
    return {};
  return Status::error("merge writes a dense weight, or values in the weight's own layout and dtype; ask for one of these.");
}

// Of a weight that is quantised, in the place of check_merged_layout.
inline Status check_quantized_merge(const MergeArgs& args) {
  const Quantization& q = args.quantization;
  if (args.weight_layout == Layout::dense && args.mask == nullptr)
    return Status::error("merge takes the mask of dense quantised codes as mask bits, and was given none; pass them.");
  if (args.merged_layout != Layout::dense)
    return Status::error("merge writes the dense weight of what quantised codes stand for; merge to dense, and compress that.");
  if (q.requantize_steps != 0 && (args.draws.rounds || args.draws.noise))
    return Status::error("merge either requantises or draws random numbers, and was asked for both; leave one out.");
  if (q.requantize_steps != 0 && q.requantize_steps != 1 && !(q.requantize_steps == 16 && q.grid == Grid::int8))
    return Status::error("merge requantises to steps of 1 or 16 of its grid, 16 from int8 alone, and was asked for " +
                         std::to_string(q.requantize_steps) + "; requantise to the stored codes' grid.");
  const bool block = q.group == 32 || q.group == 64 || q.group == 128;
  if (q.group != args.in_features && !(block && args.in_features % q.group == 0))
    return Status::error("merge takes groups of 32, 64 or 128 columns, or of whole rows, which they divide, and was given " +
                         std::to_string(q.group) + " of " + std::to_string(args.in_features) + "; quantise again.");
  return {};
}

Status merge(const MergeArgs& args, const CpuHost* host);
Status merge(const MergeArgs& args, const CudaHost& host);

}  // namespace lors
