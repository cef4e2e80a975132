// SPDX-License-Identifier: Apache-2.0
// Every operator of lors_cuda, on one screen. The kernels are registered by cpu_ops.cpp and cuda_ops.cpp; the fake and autograd
// halves live in python/lors_cuda/_library.py.
//
// weight [N, K]; mask: int32 [N, ceil(K/32)] packed bits, or None for "kept where weight != 0"; lora_A [r, K];
// lora_B [N, r]; input [T, K]; bias [N]; gradient: "lors" or "exact".
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(lors, m) {
  // merged [N, K] = weight + scaling * mask o (lora_B lora_A), in the weight's dtype.
  m.def("merge(Tensor weight, Tensor? mask, Tensor lora_A, Tensor lora_B, float scaling) -> Tensor");
  m.def(
      "merge_backward(Tensor grad_merged, Tensor weight, Tensor? mask, Tensor lora_A, Tensor lora_B, float scaling)"
      " -> (Tensor grad_lora_A, Tensor grad_lora_B)");

  // Y [T, N] = input merged^T + bias, in the input's dtype; merged is rounded once to the input's dtype and dropped.
  m.def(
      "linear(Tensor input, Tensor weight, Tensor? mask, Tensor lora_A, Tensor lora_B, Tensor? bias, float scaling,"
      " str gradient) -> Tensor");
  // What is not wanted comes back empty: `needs_*` say what is, and grad_bias is computed where `bias` is given.
  // `input` may be None when neither adapter needs a gradient.
  m.def(
      "linear_backward(Tensor grad_output, Tensor? input, Tensor weight, Tensor? mask, Tensor lora_A, Tensor lora_B,"
      " Tensor? bias, float scaling, str gradient, bool needs_input_grad, bool needs_lora_A_grad, bool needs_lora_B_grad)"
      " -> (Tensor grad_input, Tensor grad_lora_A, Tensor grad_lora_B, Tensor grad_bias)");
  m.def(
      "adapter_grad(Tensor grad_output, Tensor input, Tensor weight, Tensor? mask, Tensor lora_A, Tensor lora_B,"
      " float scaling, str gradient, bool needs_lora_A_grad, bool needs_lora_B_grad)"
      " -> (Tensor grad_lora_A, Tensor grad_lora_B)");

  m.def("mask_pack(Tensor mask) -> Tensor");                     // bool [N, K] -> int32 [N, ceil(K/32)]
  m.def("mask_unpack(Tensor bits, int in_features) -> Tensor");  // and back
  m.def("build_info() -> str");                                  // JSON: what this binary is, what it found
}
