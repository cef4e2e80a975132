// SPDX-License-Identifier: Apache-2.0
// The two large matmuls of the layer, each merging the weight while loading it, so that merged is never in memory:
//   forward         output[t, n] = sum_k activation[t, k] merged[n, k] + bias[n]       Y  = X W~^T + b
//   input gradient  output[t, k] = sum_n activation[t, n] merged[n, k]                 dX = dY W~
// merged as in merge.h, each value rounded once to `round_to`; the matmuls accumulate in float32. CUDA reads compressed
// weights for up to 16 tokens of their own 16-bit dtype and up to 64 ranks, and refuses others. With experts each row is
// multiplied by its own expert's weight, and rows beyond the last offset give zeros. On the CPU bias and output are
// float32; on CUDA output_dtype and round_to are the activation's dtype.
#pragma once

#include <lors/quantization.h>
#include <lors/status.h>
#include <lors/types.h>

namespace lors {

struct FusedLinearArgs {
  int64_t tokens = 0;        // T
  int64_t out_features = 0;  // N
  int64_t in_features = 0;   // K
  int64_t r = 0;
  bool input_gradient = false;       // which of the two matmuls
  Experts experts;                   // CUDA only; their rows gathered in the forward pass only
  const void* activation = nullptr;  // [T, K], or dY [T, N] for the input gradient; row-major
  DType activation_dtype = DType::float32;
  // As in MergeArgs; float32, bfloat16 or float16.
  Layout weight_layout = Layout::dense;
  const void* weight = nullptr;
  DType weight_dtype = DType::float32;
  const uint32_t* mask = nullptr;
  const uint8_t* metadata = nullptr;
  const int64_t* row_offsets = nullptr;
  Quantization quantization;
  const void* lora_A = nullptr;  // [r, K]
  DType lora_A_dtype = DType::float32;
  const void* lora_B = nullptr;  // [N, r]
  DType lora_B_dtype = DType::float32;
  double scaling = 1.0;
  DType round_to = DType::float32;
  const void* bias = nullptr;  // [N], forward only; null: none
  DType bias_dtype = DType::float32;
  void* output = nullptr;  // [T, N], or [T, K] for the input gradient; overwritten
  DType output_dtype = DType::float32;
};

Status fused_linear(const FusedLinearArgs& args, const CpuHost* host);
Status fused_linear(const FusedLinearArgs& args, const CudaHost& host);

}  // namespace lors
