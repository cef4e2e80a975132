// SPDX-License-Identifier: Apache-2.0
// The operators, the same on every device: check once, allocate with torch, call the core. A Backend offers
//   Backend(tensor)                      made after the checks, for the device `tensor` is on; lives through the call
//   host()                               what functions of the core take
//   matmul_dtype(activation)             the type a matmul runs in, and so the type its scratch is stored in
//   merged_rows(in_features, dtype)      how many rows of a weight to merge before they are multiplied
//   matmul(out, a, b, bias)              out = a b (+ bias broadcast over rows), all in one type: torch's own
//   prefers_fused_linear(activation, adapted, input_gradient, is_plain)   whether to take the core's matmul, with the merge
//                                        inside, instead; is_plain: the weight is dense and needs no merge
//   fused_output_dtype(activation's), fused_bias_dtype(bias)    and which types that has
//   check_offsets(...)                   refuses row offsets that lead outside the values, where that can be seen
//   kSparseMatmul, prefers_sparse_matmul(activation, adapted)   torch has sparse matmuls there; "auto" takes one
//   kMixedActivations                    whether the core's adapter gradients take dY and X of two dtypes
//   exact_at_once(...)                   the core's exact gradients in one call; false: it has none for these tensors
//   gradient_dtype(activation, accumulation), gradient_matmul(out, a, b), gradient_panel_rows(N, K, accumulation)
//                                        else, a panel of rows of G = dY^T X: the type of dY and X, torch's matmul that leaves
//                                        the panel in the accumulation type, and how many rows stay in a cache
//   bias_grad(...)
#pragma once

#include <lors/cpu.h>
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "adapted_weight.h"
#include "adapter_gradients.h"
#include "sparse_matmul.h"
#include "torch_errors.h"

namespace lors::binding {

template <typename Backend>
struct Operators {
  using Adapted = AdaptedWeight<Backend>;

  static Tensor merge(const Tensor& weight, const std::optional<Tensor>& mask, const std::optional<Tensor>& index,
                      const Tensor& lora_A, const Tensor& lora_B, double scaling, std::optional<int64_t> rounding_seed,
                      const std::optional<Tensor>& noise, int64_t noise_seed, const std::optional<Tensor>& scales,
                      const std::optional<Tensor>& zero_points, const std::string& grid, int64_t requantize_steps,
                      int64_t dither_seed) {
    const GridArguments quantization{scales, zero_points, grid, requantize_steps, dither_seed};
    const StoredWeight stored =
        check_adapted_weight("merge", weight, mask, index, lora_A, lora_B, quantization, true, Adapters::of_either);
    const DrawArguments draws = check_draws("merge", stored, rounding_seed, noise, noise_seed);
    const Backend backend(weight);
    return Adapted("merge", backend, stored, lora_A, lora_B, scaling, draws).merged(stored.dtype(), stored.dtype());
  }

  static Tensor sparse24_merge(const Tensor& values, const Tensor& metadata, const Tensor& lora_A, const Tensor& lora_B,
                               double scaling) {
    const StoredWeight stored =
        check_adapted_weight("sparse24_merge", values, std::nullopt, metadata, lora_A, lora_B, {}, false, Adapters::of_either);
    check(stored.layout == Layout::sparse24, "lors::sparse24_merge: metadata must be uint8 [out_features, in_features / 8].");
    const Backend backend(values);
    const ScalarType dtype = values.scalar_type();
    return Adapted("sparse24_merge", backend, stored, lora_A, lora_B, scaling).merged(dtype, dtype, Layout::sparse24);
  }

  static Tensor merged_operand(const Tensor& weight, const std::optional<Tensor>& mask, const std::optional<Tensor>& index,
                               const Tensor& lora_A, const Tensor& lora_B, double scaling, ScalarType dtype, int64_t tokens,
                               std::optional<int64_t> rounding_seed, const std::optional<Tensor>& noise, int64_t noise_seed,
                               const std::optional<Tensor>& scales, const std::optional<Tensor>& zero_points,
                               const std::string& grid, int64_t requantize_steps, int64_t dither_seed) {
    const GridArguments quantization{scales, zero_points, grid, requantize_steps, dither_seed};
    const StoredWeight stored =
        check_adapted_weight("merged_operand", weight, mask, index, lora_A, lora_B, quantization, true, Adapters::of_either);
    check(is_floating(dtype) && (dtype == ScalarType::Double) == (stored.dtype() == ScalarType::Double),
          "lors::merged_operand: dtype must be float32, bfloat16 or float16, or float64 for a float64 weight.");
    const DrawArguments draws = check_draws("merged_operand", stored, rounding_seed, noise, noise_seed);
    const Backend backend(weight);
    const Adapted adapted("merged_operand", backend, stored, lora_A, lora_B, scaling, draws);
    const ScalarType compute = Backend::matmul_dtype(dtype);
    if (!adapted.has_draws() && keeps_stored_layout(stored, dtype) && (compute == ScalarType::Float || tokens <= kFewTokens))
      return adapted.merged(dtype, dtype, stored.layout);
    return adapted.merged(compute, dtype);
  }

  static Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& mask,
                       const std::optional<Tensor>& index, const Tensor& lora_A, const Tensor& lora_B,
                       const std::optional<Tensor>& bias, double scaling, const std::string& gradient,
                       const std::optional<Tensor>& merged, std::optional<int64_t> rounding_seed,
                       const std::optional<Tensor>& noise, int64_t noise_seed, const std::optional<Tensor>& scales,
                       const std::optional<Tensor>& zero_points, const std::string& grid, int64_t requantize_steps,
                       int64_t dither_seed) {
    const GridArguments quantization{scales, zero_points, grid, requantize_steps, dither_seed};
    const StoredWeight stored = check_adapted_weight("linear", weight, mask, index, lora_A, lora_B, quantization, true);
    check_tokens("linear", "input", input, stored, stored.in_features);
    is_exact("linear", gradient);
    if (bias) check_bias("linear", *bias, stored);
    const ScalarType dtype = input.scalar_type(), compute = Backend::matmul_dtype(dtype);
    if (merged) check_merged("linear", *merged, stored, dtype, compute);
    const DrawArguments draws = check_draws("linear", stored, rounding_seed, noise, noise_seed);
    const Backend backend(weight);
    if (input.size(0) == 0) return empty(input, {0, stored.out_features}, dtype);
    const Adapted adapted("linear", backend, stored, lora_A, lora_B, scaling, draws);
    if constexpr (Backend::kSparseMatmul)
      if (const std::optional<Tensor> output = sparse_matmul(adapted, input, bias, merged)) return *output;
    return adapted.multiply(input, bias, false, merged);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> linear_backward(
      const Tensor& grad_output, const std::optional<Tensor>& input, const Tensor& weight, const std::optional<Tensor>& mask,
      const std::optional<Tensor>& index, const Tensor& lora_A, const Tensor& lora_B, const std::optional<Tensor>& bias,
      double scaling, const std::string& gradient, bool needs_input_grad, bool needs_lora_A_grad, bool needs_lora_B_grad,
      const std::optional<Tensor>& merged, std::optional<int64_t> rounding_seed, const std::optional<Tensor>& noise,
      int64_t noise_seed, const std::optional<Tensor>& scales, const std::optional<Tensor>& zero_points,
      const std::string& grid, int64_t requantize_steps, int64_t dither_seed) {
    const GridArguments quantization{scales, zero_points, grid, requantize_steps, dither_seed};
    const StoredWeight stored =
        check_adapted_weight("linear_backward", weight, mask, index, lora_A, lora_B, quantization, true);
    check_tokens("linear_backward", "grad_output", grad_output, stored, stored.out_features);
    const bool exact = is_exact("linear_backward", gradient);
    check(input || (!needs_lora_A_grad && !needs_lora_B_grad),
          "lors::linear_backward: input is None; it is needed for the gradients of lora_A and lora_B.");
    if (input) {
      check_tokens("linear_backward", "input", *input, stored, stored.in_features);
      check(grad_output.size(0) == input->size(0), "lors::linear_backward: grad_output has ", grad_output.size(0),
            " tokens and input ", input->size(0), "; they must be the same.");
    }
    if (bias) check_bias("linear_backward", *bias, stored);
    const ScalarType dtype = grad_output.scalar_type(), compute = Backend::matmul_dtype(dtype);
    if (merged) check_merged("linear_backward", *merged, stored, dtype, compute);
    const DrawArguments draws = check_draws("linear_backward", stored, rounding_seed, noise, noise_seed);

    const Backend backend(weight);
    const Adapted adapted("linear_backward", backend, stored, lora_A, lora_B, scaling, draws);
    const int64_t T = grad_output.size(0), N = stored.out_features, K = stored.in_features;

    const Tensor grad_input = needs_input_grad && T > 0 ? adapted.multiply(grad_output, std::nullopt, true, merged)
                                                        : empty(grad_output, {needs_input_grad ? T : 0, K}, dtype);

    Tensor grad_lora_A = adapted.empty_gradient(adapted.lora_A, needs_lora_A_grad);
    Tensor grad_lora_B = adapted.empty_gradient(adapted.lora_B, needs_lora_B_grad);
    if (needs_lora_A_grad || needs_lora_B_grad)
      adapter_gradients(grad_output, *input, adapted, exact, needs_lora_A_grad ? &grad_lora_A : nullptr,
                        needs_lora_B_grad ? &grad_lora_B : nullptr);

    Tensor grad_bias = empty(grad_output, {bias ? N : 0}, bias ? bias->scalar_type() : dtype);
    if (bias) backend.bias_grad(grad_output, grad_bias);
    return {grad_input, grad_lora_A, grad_lora_B, grad_bias};
  }

  static std::tuple<Tensor, Tensor> merge_backward(const Tensor& grad_merged, const Tensor& weight,
                                                   const std::optional<Tensor>& mask, const std::optional<Tensor>& index,
                                                   const Tensor& lora_A, const Tensor& lora_B, double scaling,
                                                   const std::optional<Tensor>& scales,
                                                   const std::optional<Tensor>& zero_points, const std::string& grid,
                                                   int64_t requantize_steps, int64_t dither_seed) {
    const GridArguments quantization{scales, zero_points, grid, requantize_steps, dither_seed};
    const StoredWeight stored =
        check_adapted_weight("merge_backward", weight, mask, index, lora_A, lora_B, quantization, false, Adapters::of_either);
    check(grad_merged.dim() == 2 && grad_merged.size(0) == stored.out_features && grad_merged.size(1) == stored.in_features,
          "lors::merge_backward: grad_merged has shape ", shape(grad_merged), "; it must be ", stored.shape(), ".");
    check(grad_merged.scalar_type() == stored.dtype(), "lors::merge_backward: grad_merged must have the weight's dtype.");
    check_same_device("merge_backward", "grad_merged", grad_merged, weight);
    check_storage("merge_backward", "grad_merged", grad_merged);
    const Backend backend(weight);
    const Adapted adapted("merge_backward", backend, stored, lora_A, lora_B, scaling);
    const int64_t N = stored.rows_of_one(), K = stored.in_features;
    const Tensor G = row_major(grad_merged);
    Tensor grad_lora_A = adapted.empty_gradient(adapted.lora_A), grad_lora_B = adapted.empty_gradient(adapted.lora_B);
    for (int64_t e = 0; e < adapted.parts(); ++e) {
      const Adapted one = adapted.part(e);
      Tensor dA = adapted.part(grad_lora_A, e), dB = adapted.part(grad_lora_B, e);
      Tensor sum = torch::stable::new_zeros(weight, std::vector<int64_t>{K, one.r()}, accumulation_dtype(weight));
      std::optional<Scratch<Backend>> scratch;
      one.contract(slice(G, 0, e * N, N), one.kept(scratch), &sum, &dB);
      torch::stable::copy_(dA, torch::stable::transpose(sum, 0, 1));
    }
    return {grad_lora_A, grad_lora_B};
  }

  // Registers the kernels of this device.
  static void implement(torch::stable::detail::StableLibrary& library) {
    library.impl("merge", TORCH_BOX(&explained<&Operators::merge>));
    library.impl("merge_backward", TORCH_BOX(&explained<&Operators::merge_backward>));
    library.impl("merged_operand", TORCH_BOX(&explained<&Operators::merged_operand>));
    library.impl("linear", TORCH_BOX(&explained<&Operators::linear>));
    library.impl("linear_backward", TORCH_BOX(&explained<&Operators::linear_backward>));
    library.impl("sparse24_merge", TORCH_BOX(&explained<&Operators::sparse24_merge>));
  }
};

}  // namespace lors::binding
