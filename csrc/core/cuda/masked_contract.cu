// SPDX-License-Identifier: Apache-2.0
// Launches the contraction of a given gradient: a panel of rows of G at a time, so that the partial sums stay below
// kContractPartialBytes; reduce_partials then adds them up in a fixed order.
#include "masked_contract.cuh"

#include <lors/adapter_grad.h>

#include "reduce.cuh"

namespace lors {
namespace {

using namespace cuda;

template <typename T>
Status launch_contract(const ContractProblem& problem, int64_t blocks, const CudaHost& host) {
  return launch("masked_contract", masked_contract_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kContractThreads),
                problem.shared.total, host, problem);
}

}  // namespace

Status masked_contract(const MaskedContractArgs& args, const CudaHost& host) {
  const int64_t N = args.rows, K = args.in_features, r = args.r;
  const bool want_A = args.lora_A_sum != nullptr, want_B = args.lora_B_grad != nullptr;
  if (Status status = check_no_float64("masked_contract", {args.grad_weight_dtype, args.lora_A_dtype, args.lora_B_dtype,
                                                           args.mask ? DType::float32 : args.weight_dtype});
      !status.ok())
    return status;
  if (r == 0 || (!want_A && !want_B)) return {};
  PartialSums sum_A, grad_B;  // [K, r] and [rows, r]
  sum_A.out = args.lora_A_sum;
  sum_A.add = true;
  sum_A.rows = want_A ? K : 0;
  grad_B.out = args.lora_B_grad;
  grad_B.dtype = args.lora_B_dtype;
  grad_B.rows = want_B ? N : 0;
  sum_A.columns = grad_B.columns = sum_A.out_pitch = grad_B.out_pitch = r;
  sum_A.scale = grad_B.scale = static_cast<float>(args.scaling);
  if (N == 0 || K == 0) return reduce_partials({grad_B}, host);  // empty sums: zeros

  DeviceLimits limits;
  if (Status status = device_limits(limits); !status.ok()) return status;
  ContractProblem problem{};
  problem.shared = contract_shared(split_terms(args.lora_A_dtype), split_terms(args.lora_B_dtype));
  if (problem.shared.total > limits.shared_bytes)
    return Status::error("masked_contract needs " + std::to_string(problem.shared.total) +
                         " bytes of shared memory per block, and this device has " + std::to_string(limits.shared_bytes) +
                         "; use adapters of a 16-bit dtype or a GPU of architecture 80 or later.");
  const ContractConfig c = contract_config(N, K, r, want_A, want_B, limits);
  if (c.column_tiles * c.panel_tiles > 0x7fffffff)
    return Status::error("masked_contract found no tiling of a weight of [" + std::to_string(N) + ", " + std::to_string(K) +
                         "] with as few blocks as CUDA can launch; split it by rows.");
  const Scratch partials_A(host, want_A ? c.panel_tiles * K * c.width : 0);
  const Scratch partials_B(host, want_B ? c.column_tiles * (N < c.panel_rows() ? N : c.panel_rows()) * c.width : 0);
  problem.grad_weight = args.grad_weight;
  problem.grad_weight_vectors = has_vectors(args.grad_weight, K);
  problem.weight = args.weight;
  problem.weight_dtype = args.weight_dtype;
  problem.weight_vectors = has_vectors(args.weight, K);
  problem.mask = args.mask;
  problem.mask_pitch = mask_words(K);
  problem.mask_vectors = problem.mask_pitch % 4 == 0 && reinterpret_cast<uintptr_t>(args.mask) % 16 == 0;
  problem.lora_A = matrix(args.lora_A, args.lora_A_dtype, r, K);
  problem.lora_B = matrix(args.lora_B, args.lora_B_dtype, N, r);
  problem.columns = K;
  problem.column_tiles = static_cast<int>(c.column_tiles);
  problem.width = sum_A.width = grad_B.width = c.width;
  problem.partial_A = partials_A.data();
  problem.partial_B = partials_B.data();
  sum_A.partials = partials_A.data();
  grad_B.partials = partials_B.data();
  grad_B.count = c.column_tiles;
  const auto launch_of = args.grad_weight_dtype == DType::float32    ? launch_contract<float>
                         : args.grad_weight_dtype == DType::bfloat16 ? launch_contract<bfloat16>
                                                                     : launch_contract<float16>;
  for (int64_t row = 0; row < N; row += c.panel_rows()) {
    problem.first_row = row;
    problem.rows = N - row < c.panel_rows() ? N : row + c.panel_rows();
    problem.row_tiles = static_cast<int>(contract_parts(problem.rows - row, kContractRows));
    if (Status status = launch_of(problem, problem.row_tiles * c.column_tiles, host); !status.ok()) return status;
    sum_A.count = problem.row_tiles;
    grad_B.rows = want_B ? problem.rows - row : 0;
    grad_B.out = static_cast<char*>(args.lora_B_grad) + row * r * dtype_size(grad_B.dtype);
    if (Status status = reduce_partials({grad_B, sum_A}, host); !status.ok()) return status;
  }
  return {};
}

}  // namespace lors
