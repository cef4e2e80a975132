// SPDX-License-Identifier: Apache-2.0
// The operators of mixtures of experts: lors::linear and lors::linear_backward for a stack of matrices [E N, K], each with the
// rows of the input [S, K] that are its own. Expert e has rows [offsets[e - 1], offsets[e]), and
//   Y_e = X_e W~_e^T + b_e,   dX_e = dY_e W~_e,   dA_e, dB_e and db_e as those of one matrix (lors/adapter_grad.h)
// with X_i = input[rows[i]] where `rows` are given. Rows of no expert give zeros, and so do the gradients of an expert without
// rows, of which nothing is read. A Backend offers, beside what operators.h names, a type
//   Groups(op, offsets, rows, S, T)      which rows are whose, checked as far as the device lets it; by_row(): without `rows`
// and
//   grouped_multiply(out, activation, groups, adapted, bias, input_gradient, merged)    all of out [S, N], or [S, K]
//   grouped_adapter_gradients(dY, X, groups, adapted, exact, dA, dB)   all of dA [E, r, K] and dB [E, N, r]; null: not wanted
//   grouped_bias_gradient(dY, groups, db)                              all of db [E, N]
// Both operators take the tensors row-major and check them first; float64, gradients and grids are as in lors::linear.
#pragma once

#include "operators.h"

namespace lors::binding {

template <typename Backend>
struct GroupedOperators {
  using Adapted = AdaptedWeight<Backend>;

  static Tensor grouped_linear(const Tensor& input, const Tensor& offsets, const Tensor& weight,
                               const std::optional<Tensor>& mask, const std::optional<Tensor>& index, const Tensor& lora_A,
                               const Tensor& lora_B, const std::optional<Tensor>& bias, double scaling,
                               const std::string& gradient, const std::optional<Tensor>& merged,
                               const std::optional<Tensor>& rows, const std::optional<Tensor>& scales,
                               const std::optional<Tensor>& zero_points, const std::string& grid, int64_t requantize_steps,
                               int64_t dither_seed) {
    constexpr const char* op = "grouped_linear";
    const GridArguments quantization{scales, zero_points, grid, requantize_steps, dither_seed};
    const StoredWeight stored =
        check_adapted_weight(op, weight, mask, index, lora_A, lora_B, quantization, true, Adapters::of_experts);
    check_tokens(op, "input", input, stored, stored.in_features);
    check_groups(op, offsets, rows, stored);
    is_exact(op, gradient);
    if (bias) check_bias(op, *bias, stored);
    const ScalarType dtype = input.scalar_type();
    if (merged) check_merged(op, *merged, stored, dtype, Backend::matmul_dtype(dtype));
    const Backend backend(weight);
    const int64_t S = rows ? rows->size(0) : input.size(0);
    const typename Backend::Groups groups(op, row_major(offsets), row_major(rows), S, input.size(0));
    Tensor output = empty(input, {S, stored.rows_of_one()}, dtype);
    const Adapted adapted(op, backend, stored, lora_A, lora_B, scaling);
    if (S > 0) backend.grouped_multiply(output, row_major(input), groups, adapted, bias, false, merged);
    return output;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> grouped_linear_backward(
      const Tensor& grad_output, const std::optional<Tensor>& input, const Tensor& offsets, const Tensor& weight,
      const std::optional<Tensor>& mask, const std::optional<Tensor>& index, const Tensor& lora_A, const Tensor& lora_B,
      const std::optional<Tensor>& bias, double scaling, const std::string& gradient, bool needs_input_grad,
      bool needs_lora_A_grad, bool needs_lora_B_grad, const std::optional<Tensor>& merged, const std::optional<Tensor>& rows,
      const std::optional<Tensor>& scales, const std::optional<Tensor>& zero_points, const std::string& grid,
      int64_t requantize_steps, int64_t dither_seed) {
    constexpr const char* op = "grouped_linear_backward";
    const GridArguments quantization{scales, zero_points, grid, requantize_steps, dither_seed};
    const StoredWeight stored =
        check_adapted_weight(op, weight, mask, index, lora_A, lora_B, quantization, true, Adapters::of_experts);
    const int64_t S = grad_output.size(0), N = stored.rows_of_one(), K = stored.in_features;
    check_tokens(op, "grad_output", grad_output, stored, N);
    check_groups(op, offsets, rows, stored);
    const bool exact = is_exact(op, gradient);
    check(input || (!needs_lora_A_grad && !needs_lora_B_grad),
          "lors::grouped_linear_backward: input is None; it is needed for the gradients of lora_A and lora_B.");
    if (input) check_tokens(op, "input", *input, stored, K);
    const int64_t given = rows ? rows->size(0) : input ? input->size(0) : S;
    check(given == S, "lors::grouped_linear_backward: grad_output has ", S, " rows and ", rows ? "rows " : "input ", given,
          "; they must be the same.");
    if (bias) check_bias(op, *bias, stored);
    const ScalarType dtype = grad_output.scalar_type();
    if (merged) check_merged(op, *merged, stored, dtype, Backend::matmul_dtype(dtype));
    const Backend backend(weight);
    const Tensor dY = row_major(grad_output);
    const typename Backend::Groups groups(op, row_major(offsets), input ? row_major(rows) : std::nullopt, S,
                                          input ? input->size(0) : S);
    const Adapted adapted(op, backend, stored, lora_A, lora_B, scaling);

    Tensor grad_input = empty(grad_output, {needs_input_grad ? S : 0, K}, dtype);
    if (needs_input_grad && S > 0)
      backend.grouped_multiply(grad_input, dY, groups.by_row(), adapted, std::nullopt, true, merged);
    Tensor grad_lora_A = adapted.empty_gradient(adapted.lora_A, needs_lora_A_grad);
    Tensor grad_lora_B = adapted.empty_gradient(adapted.lora_B, needs_lora_B_grad);
    if (needs_lora_A_grad || needs_lora_B_grad)
      backend.grouped_adapter_gradients(dY, row_major(*input), groups, adapted, exact,
                                        needs_lora_A_grad ? &grad_lora_A : nullptr, needs_lora_B_grad ? &grad_lora_B : nullptr);
    Tensor grad_bias = empty(grad_output, {bias ? stored.experts : 0, N}, bias ? bias->scalar_type() : dtype);
    if (bias) backend.grouped_bias_gradient(dY, groups, grad_bias);
    return {grad_input, grad_lora_A, grad_lora_B, grad_bias};
  }

  // Registers the kernels of this device.
  static void implement(torch::stable::detail::StableLibrary& library) {
    library.impl("grouped_linear", TORCH_BOX(&explained<&GroupedOperators::grouped_linear>));
    library.impl("grouped_linear_backward", TORCH_BOX(&explained<&GroupedOperators::grouped_linear_backward>));
  }
};

}  // namespace lors::binding
