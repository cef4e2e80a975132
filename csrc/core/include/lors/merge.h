// SPDX-License-Identifier: Apache-2.0
// merged[n, k] = kept[n, k] ? weight[n, k] + scaling * sum_r lora_B[n, r] * lora_A[r, k] : +0     (arXiv 2501.08582, eq. 3)
// fp32 accumulation (float64 for a float64 weight), one rounding.
#pragma once

#include <lors/status.h>
#include <lors/types.h>

namespace lors {

struct MergeArgs {
  int64_t out_features = 0;  // N
  int64_t in_features = 0;   // K
  int64_t r = 0;
  const void* weight = nullptr;  // [N, K] row-major, frozen
  DType weight_dtype = DType::float32;
  const uint32_t* mask = nullptr;  // [N, ceil(K/32)] bits, 1 = kept; null: kept where weight != 0 (-0.0 counts as zero)
  const void* lora_A = nullptr;    // [r, K] row-major
  DType lora_A_dtype = DType::float32;
  const void* lora_B = nullptr;  // [N, r] row-major
  DType lora_B_dtype = DType::float32;
  double scaling = 1.0;
  void* merged = nullptr;  // [N, K] row-major, overwritten whole
  DType merged_dtype = DType::float32;
  // The type each value is rounded to, once. It is merged_dtype, or a 16-bit type held in a float32 `merged`: a
  // float32 product then sees exactly the values that a 16-bit merged weight has.
  DType round_to = DType::float32;
};

Status merge(const MergeArgs& args, const CpuHost* host);
Status merge(const MergeArgs& args, const CudaHost& host);

}  // namespace lors
