// SPDX-License-Identifier: Apache-2.0
// Gradients of the adapters, without an N x K gradient in memory (arXiv 2501.08582, section 3.2):
//   "lors"   lora_B_grad = s dY^T (X A^T)            lora_A_grad = s (dY B)^T X
//   "exact"  lora_B_grad = s (M o dY^T X) A^T        lora_A_grad = s B^T (M o dY^T X), by panels of dY^T X
#pragma once

#include <lors/status.h>
#include <lors/types.h>

namespace lors {

struct AdapterGradArgs {
  int64_t tokens = 0;        // T
  int64_t out_features = 0;  // N
  int64_t in_features = 0;   // K
  int64_t r = 0;
  const void* grad_output = nullptr;  // dY [T, N] row-major
  DType grad_output_dtype = DType::float32;
  const void* input = nullptr;  // X [T, K] row-major
  DType input_dtype = DType::float32;
  const void* lora_A = nullptr;  // [r, K]
  DType lora_A_dtype = DType::float32;
  const void* lora_B = nullptr;  // [N, r]
  DType lora_B_dtype = DType::float32;
  double scaling = 1.0;
  Experts experts;              // adapter_grad_lors on CUDA only; each has gradients of its own, zeros where it has no rows
  void* lora_A_grad = nullptr;  // [r, K] in lora_A_dtype; null: not wanted
  void* lora_B_grad = nullptr;  // [N, r] in lora_B_dtype; null: not wanted
};

// The "lors" gradients. Bit-reproducible for any number of threads.
Status adapter_grad_lors(const AdapterGradArgs& args, const CpuHost* host);
Status adapter_grad_lors(const AdapterGradArgs& args, const CudaHost& host);

// The "exact" gradients in one call, bit-reproducible: only by a CPU's bfloat16 matmul instructions, which multiply exactly and
// add in float32; `done` is false, and nothing was computed, where these do not apply to dY and X. There, and on CUDA, the
// caller forms panels of G and calls masked_contract.
struct AdapterGradExactArgs : AdapterGradArgs {
  const void* weight = nullptr;  // [N, K]; read only where `mask` is null
  DType weight_dtype = DType::float32;
  const uint32_t* mask = nullptr;  // [N, ceil(K/32)] bits, 1 = kept; null: kept where weight != 0
};

Status adapter_grad_exact(const AdapterGradExactArgs& args, const CpuHost* host, bool* done);

// Contracts a panel of rows of G, any gradient of the merged weight, with the adapters:
//   lora_B_grad[n, :] = s sum_k kept[n, k] G[n, k] lora_A[:, k]
//   lora_A_sum[k, :] += s sum_n kept[n, k] G[n, k] lora_B[n, :]
// lora_A_sum has the accumulation type (float64 if grad_weight is, else float32), so that it is rounded once, after all panels.
struct MaskedContractArgs {
  int64_t rows = 0;
  int64_t in_features = 0;  // K
  int64_t r = 0;
  const void* grad_weight = nullptr;  // G [rows, K] row-major
  DType grad_weight_dtype = DType::float32;
  const void* weight = nullptr;  // [rows, K], the panel's rows; read only where `mask` is null
  DType weight_dtype = DType::float32;
  const uint32_t* mask = nullptr;  // [rows, ceil(K/32)] bits, the panel's rows; null: kept where weight != 0
  const void* lora_A = nullptr;    // [r, K]
  DType lora_A_dtype = DType::float32;
  const void* lora_B = nullptr;  // [rows, r], the panel's rows
  DType lora_B_dtype = DType::float32;
  double scaling = 1.0;
  void* lora_A_sum = nullptr;   // [K, r], added to; null: not wanted
  void* lora_B_grad = nullptr;  // [rows, r] in lora_B_dtype, overwritten; null: not wanted
};

Status masked_contract(const MaskedContractArgs& args, const CpuHost* host);
Status masked_contract(const MaskedContractArgs& args, const CudaHost& host);

// db[n] = sum_t dY[t, n], accumulated in float32 (float64 for float64), rounded once.
struct BiasGradArgs {
  int64_t tokens = 0;
  int64_t out_features = 0;
  const void* grad_output = nullptr;  // [T, N] row-major
  DType grad_output_dtype = DType::float32;
  void* bias_grad = nullptr;  // [N]
  DType bias_grad_dtype = DType::float32;
};

Status bias_grad(const BiasGradArgs& args, const CpuHost* host);

}  // namespace lors
