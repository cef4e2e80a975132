// SPDX-License-Identifier: Apache-2.0
// The gradients of one matrix's adapter (lors/adapter_grad.h), the same on every device. `Backend`: see operators.h.
#pragma once

#include <lors/adapter_grad.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "adapted_weight.h"

namespace lors::binding {

// By panels of rows of G = dY^T X, the weight's gradient: each is masked, contracted and overwritten by the next. `dtype`: of
// dY and X, where it is not their own.
template <typename Backend>
void exact_adapter_gradients(const Tensor& grad_output, const Tensor& input, std::optional<ScalarType> dtype,
                             const AdaptedWeight<Backend>& adapted, Tensor* grad_lora_A, Tensor* grad_lora_B) {
  std::optional<Scratch<Backend>> scratch;
  const uint32_t* kept = adapted.kept(scratch);
  if (Backend::exact_at_once(grad_output, input, adapted, kept, grad_lora_A, grad_lora_B)) return;
  const int64_t N = adapted.out_features(), K = adapted.in_features(), r = adapted.r();
  const ScalarType acc = accumulation_dtype(adapted.weight);
  const ScalarType multiplied = Backend::gradient_dtype(dtype.value_or(input.scalar_type()), acc);
  const Tensor dY = row_major(grad_output, multiplied), X = row_major(input, multiplied);
  const int64_t panel_rows = adapted.backend.gradient_panel_rows(N, K, acc);
  Tensor lora_A_sum = torch::stable::new_zeros(X, std::vector<int64_t>{K, r}, acc);
  Scratch<Backend> panel(X, panel_rows, K, acc);
  for (int64_t begin = 0; begin < N; begin += panel_rows) {
    const int64_t rows = std::min(panel_rows, N - begin);
    Tensor grad_weight = slice(panel.tensor, 0, 0, rows);
    Backend::gradient_matmul(grad_weight, torch::stable::transpose(slice(dY, 1, begin, rows), 0, 1), X);
    std::optional<Tensor> grad_rows;
    if (grad_lora_B) grad_rows = slice(*grad_lora_B, 0, begin, rows);
    adapted.rows(begin, rows)
        .contract(grad_weight, kept ? kept + begin * mask_words(K) : nullptr, grad_lora_A ? &lora_A_sum : nullptr,
                  grad_rows ? &*grad_rows : nullptr);
  }
  if (grad_lora_A) torch::stable::copy_(*grad_lora_A, torch::stable::transpose(lora_A_sum, 0, 1));
}

// Writes dA [r, K] and dB [N, r], row-major; null: not wanted.
template <typename Backend>
void adapter_gradients(const Tensor& grad_output, const Tensor& input, const AdaptedWeight<Backend>& adapted, bool exact,
                       Tensor* grad_lora_A, Tensor* grad_lora_B) {
  if (input.size(0) == 0) {
    if (grad_lora_A) torch::stable::zero_(*grad_lora_A);
    if (grad_lora_B) torch::stable::zero_(*grad_lora_B);
    return;
  }
  std::optional<ScalarType> dtype;  // float32 holds every value of both
  if (!Backend::kMixedActivations && grad_output.scalar_type() != input.scalar_type()) dtype = ScalarType::Float;
  if (exact) return exact_adapter_gradients(grad_output, input, dtype, adapted, grad_lora_A, grad_lora_B);
  const Tensor dY = row_major(grad_output, dtype), X = row_major(input, dtype);
  AdapterGradArgs args;
  adapted.describe_gradients(args, dY, X, grad_lora_A, grad_lora_B);
  check_status(adapter_grad_lors(args, adapted.backend.host()));
}

}  // namespace lors::binding
