// SPDX-License-Identifier: Apache-2.0
// Launches the "exact" adapter gradients, and the contraction of a given gradient: a panel of rows of G at a time, so that the
// partial sums stay below kExactPartialBytes; reduce_partials then adds them up in a fixed order.
#include "adapter_grad_exact.cuh"

#include <lors/adapter_grad.h>

#include "launch.h"
#include "reduce.cuh"

namespace lors {
namespace {

using namespace cuda;

using Launch = Status (*)(const ExactProblem& problem, const ExactConfig& config, int64_t blocks, const CudaHost& host);

template <typename T, int kColumns>
Status launch_matmul(const ExactProblem& problem, const ExactConfig& config, int64_t blocks, const CudaHost& host) {
  return launch("adapter_grad_exact", adapter_grad_exact_kernel<T, kColumns / 4>, dim3(static_cast<unsigned>(blocks)),
                dim3(kExactThreads), config.shared_bytes, host, problem);
}

template <typename T>
Status launch_given(const ExactProblem& problem, const ExactConfig& config, int64_t blocks, const CudaHost& host) {
  return launch("masked_contract", masked_contract_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kExactThreads),
                config.shared_bytes, host, problem);
}

Launch matmul_launch(DType dtype, int columns) {
  if (dtype == DType::float32) return launch_matmul<float, kExactNarrow>;
  if (dtype == DType::bfloat16)
    return columns == kExactWide ? launch_matmul<bfloat16, kExactWide> : launch_matmul<bfloat16, kExactNarrow>;
  return columns == kExactWide ? launch_matmul<float16, kExactWide> : launch_matmul<float16, kExactNarrow>;
}

// Both gradients. The caller has set out, out_pitch, dtype, scale, transpose and add of grad_A and grad_B.
Status run_panels(const char* name, ExactProblem problem, const ExactShape& shape, PartialSums grad_A, PartialSums grad_B,
                  Launch (*launch_of)(DType, int), DType dtype, const CudaHost& host) {
  const int64_t N = shape.rows, K = shape.columns, r = shape.r;
  grad_A.rows = K;
  grad_A.columns = grad_B.columns = r;
  if (r == 0) return {};
  if (shape.tokens == 0 || N == 0 || K == 0) {  // empty sums: zeros
    grad_B.rows = N;
    Status status = shape.want_A && !grad_A.add ? reduce_partials({grad_A}, host) : Status();
    return status.ok() && shape.want_B ? reduce_partials({grad_B}, host) : status;
  }
  if (!shape.want_A && !shape.want_B) return {};

  DeviceLimits limits;
  if (Status status = device_limits(limits); !status.ok()) return status;
  const ExactConfig c = exact_config(shape, limits);
  if (c.columns == 0)
    return Status::error(std::string(name) + " needs " +
                         std::to_string(exact_shared(kExactNarrow, shape.terms, shape.terms_A, shape.terms_B).total) +
                         " bytes of shared memory per block, and this device has " + std::to_string(limits.shared_bytes) +
                         "; use adapters of a 16-bit dtype or a GPU of architecture 80 or later.");
  if (c.column_tiles * c.panel_tiles * c.splits > 0x7fffffff)
    return Status::error(std::string(name) + " found no tiling of a weight of [" + std::to_string(N) + ", " +
                         std::to_string(K) + "] with as few blocks as CUDA can launch; split it by rows.");
  const bool panels = c.panel_tiles < c.row_tiles, sum_panels = panels && shape.want_A && !grad_A.add;
  const Scratch partials_A(host, shape.want_A ? c.partials_A() * K * c.width : 0);
  const Scratch partials_B(host, shape.want_B ? c.partials_B() * (N < c.panel_rows() ? N : c.panel_rows()) * c.width : 0);
  const Scratch sum_A(host, sum_panels ? K * c.width : 0);
  char* const out_B = static_cast<char*>(grad_B.out);
  problem.shared = exact_shared(c.columns, shape.terms, shape.terms_A, shape.terms_B);
  problem.column_tiles = static_cast<int>(c.column_tiles);
  problem.range_tokens = c.range_tokens;
  problem.width = grad_A.width = grad_B.width = c.width;
  problem.partial_A = partials_A.data();
  problem.partial_B = partials_B.data();
  grad_A.partials = partials_A.data();
  grad_B.partials = partials_B.data();
  for (int64_t row = 0; row < N; row += c.panel_rows()) {
    problem.first_row = row;
    problem.rows = N - row < c.panel_rows() ? N : row + c.panel_rows();
    problem.row_tiles = static_cast<int>(exact_parts(problem.rows - row, kExactRows));
    const int64_t blocks = problem.row_tiles * c.column_tiles * c.splits;
    if (Status status = launch_of(dtype, c.columns)(problem, c, blocks, host); !status.ok()) return status;
    if (shape.want_B) {
      grad_B.count = c.partials_B();
      grad_B.rows = problem.rows - row;
      grad_B.out = out_B + row * r * dtype_size(grad_B.dtype);
      if (Status status = reduce_partials({grad_B}, host); !status.ok()) return status;
    }
    if (shape.want_A) {
      PartialSums sums = sum_panels ? panel_sums(grad_A, sum_A.data(), row == 0) : grad_A;
      sums.count = c.splits * problem.row_tiles;
      if (Status status = reduce_partials({sums}, host); !status.ok()) return status;
    }
  }
  if (!sum_panels) return {};
  grad_A.partials = sum_A.data();
  grad_A.count = 1;
  return reduce_partials({grad_A}, host);
}

template <typename Args>
ExactProblem describe(const Args& args, int64_t N, int64_t K) {
  ExactProblem problem{};
  problem.weight = args.weight;
  problem.weight_dtype = args.weight_dtype;
  problem.weight_vectors = has_vectors(args.weight, K);
  problem.mask = args.mask;
  problem.mask_pitch = mask_words(K);
  problem.mask_vectors = problem.mask_pitch % 4 == 0 && reinterpret_cast<uintptr_t>(args.mask) % 16 == 0;
  problem.lora_A = matrix(args.lora_A, args.lora_A_dtype, args.r, K);
  problem.lora_B = matrix(args.lora_B, args.lora_B_dtype, N, args.r);
  problem.columns = K;
  problem.all_rows = N;
  return problem;
}

template <typename Args>
ExactShape shape_of(const Args& args, int64_t N, int64_t K) {
  ExactShape shape;
  shape.rows = N;
  shape.columns = K;
  shape.r = args.r;
  shape.terms_A = split_terms(args.lora_A_dtype);
  shape.terms_B = split_terms(args.lora_B_dtype);
  shape.want_B = args.lora_B_grad != nullptr;
  return shape;
}

}  // namespace

Status adapter_grad_exact(const AdapterGradExactArgs& args, const CudaHost& host) {
  const int64_t N = args.out_features, K = args.in_features;
  if (Status status =
          check_no_float64("adapter_grad_exact", {args.grad_output_dtype, args.input_dtype, args.lora_A_dtype,
                                                  args.lora_B_dtype, args.mask ? DType::float32 : args.weight_dtype});
      !status.ok())
    return status;
  if (args.grad_output_dtype != args.input_dtype)
    return Status::error(std::string("adapter_grad_exact multiplies grad_output and input in one dtype, and was given ") +
                         dtype_name(args.grad_output_dtype) + " and " + dtype_name(args.input_dtype) +
                         "; convert one of them.");
  ExactProblem problem = describe(args, N, K);
  problem.grad_output = args.grad_output;
  problem.input = args.input;
  problem.tokens = args.tokens;
  problem.grad_output_vectors = has_vectors(args.grad_output, N);
  problem.input_vectors = has_vectors(args.input, K);
  ExactShape shape = shape_of(args, N, K);
  shape.tokens = args.tokens;
  shape.terms = args.input_dtype == DType::float32 ? 3 : 1;
  shape.want_A = args.lora_A_grad != nullptr;
  PartialSums grad_A, grad_B;  // [r, K] and [N, r]
  grad_A.out = args.lora_A_grad;
  grad_A.out_pitch = K;
  grad_A.dtype = args.lora_A_dtype;
  grad_A.transpose = true;
  grad_B.out = args.lora_B_grad;
  grad_B.out_pitch = args.r;
  grad_B.dtype = args.lora_B_dtype;
  grad_A.scale = grad_B.scale = static_cast<float>(args.scaling);
  return run_panels("adapter_grad_exact", problem, shape, grad_A, grad_B, matmul_launch, args.input_dtype, host);
}

Status masked_contract(const MaskedContractArgs& args, const CudaHost& host) {
  const int64_t N = args.rows, K = args.in_features;
  if (Status status = check_no_float64("masked_contract", {args.grad_weight_dtype, args.lora_A_dtype, args.lora_B_dtype,
                                                           args.mask ? DType::float32 : args.weight_dtype});
      !status.ok())
    return status;
  ExactProblem problem = describe(args, N, K);
  problem.grad_output = args.grad_weight;
  problem.grad_output_vectors = has_vectors(args.grad_weight, K);
  ExactShape shape = shape_of(args, N, K);
  shape.tokens = 1;
  shape.terms = 0;
  shape.want_A = args.lora_A_sum != nullptr;
  PartialSums grad_A, grad_B;  // [K, r] and [rows, r]
  grad_A.out = args.lora_A_sum;
  grad_A.add = true;
  grad_B.out = args.lora_B_grad;
  grad_B.dtype = args.lora_B_dtype;
  grad_A.out_pitch = grad_B.out_pitch = args.r;
  grad_A.scale = grad_B.scale = static_cast<float>(args.scaling);
  const auto launch_of = [](DType dtype, int) -> Launch {
    return dtype == DType::float32    ? launch_given<float>
           : dtype == DType::bfloat16 ? launch_given<bfloat16>
                                      : launch_given<float16>;
  };
  return run_panels("masked_contract", problem, shape, grad_A, grad_B, launch_of, args.grad_weight_dtype, host);
}

}  // namespace lors
