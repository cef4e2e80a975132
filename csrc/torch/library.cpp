// SPDX-License-Identifier: Apache-2.0
// Every operator of lors_cuda, on one screen. The kernels are registered by cpu_ops.cpp and cuda_ops.cpp; fake kernels are
// in python/lors_cuda/_library.py, the derivatives in _autograd.py.
//
// A weight [N, K] is stored in one of three layouts, and `index` tells which:
//   dense   weight [N, K], index None; mask: int32 [N, ceil(K/32)] packed bits, or None for "kept where weight != 0"
//   2:4     weight [N, K/2], mask None, index: uint8 metadata [N, ceil(K/8)]           (csrc/core/include/lors/sparse24.h)
//   bitmap  weight [count], mask: its bits, index: int64 row_offsets [N + 1]            (csrc/core/include/lors/types.h)
// lora_A [r, K]; lora_B [N, r]; input [T, K]; bias [N]; gradient: "lors" or "exact".
//
// A quantised weight (csrc/core/include/lors/quantization.h) has a grid: "int8", codes int8; "e4m3", uint8 with the bits of
// float8_e4m3fn; "int4", uint8 with two codes each, so [N, K/2], [N, K/4] or [count / 2]. And scales [N, K / group], float32,
// bfloat16 or float16, for groups of 32, 64, 128 or K columns; zero_points, int8 like scales, or None; always a mask or
// metadata. The weight's dtype is then that of scales. requantize_steps: 0, or 1 or 16: the merged weight is put on the grid
// again; dither_seed: below 0 for none.
//
// What the merge draws (csrc/core/include/lors/random.h), the same in every call with the same arguments: rounding_seed, None
// for rounding to nearest, rounds a 16-bit merged weight by chance; noise, float32 [N], is the standard deviation of what is
// added to each row's kept entries.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(lors, m) {
  // merged [N, K] = weight + scaling * mask o (lora_B lora_A), in the weight's dtype. With r = 0 it decompresses and
  // dequantises.
  m.def(
      "merge(Tensor weight, Tensor? mask, Tensor? index, Tensor lora_A, Tensor lora_B, float scaling,"
      " SymInt? rounding_seed=None, Tensor? noise=None, SymInt noise_seed=0,"
      " Tensor? scales=None, Tensor? zero_points=None, str grid=\"\", SymInt requantize_steps=0, SymInt dither_seed=-1)"
      " -> Tensor");
  m.def(
      "merge_backward(Tensor grad_merged, Tensor weight, Tensor? mask, Tensor? index, Tensor lora_A, Tensor lora_B, float "
      "scaling,"
      " Tensor? scales=None, Tensor? zero_points=None, str grid=\"\", SymInt requantize_steps=0, SymInt dither_seed=-1)"
      " -> (Tensor grad_lora_A, Tensor grad_lora_B)");

  // merged [N, K] rounded once to `dtype`, stored in the type that matmuls of `dtype` run in, or as values in the weight's
  // layout where matmuls of that many tokens read these as fast (keeps_stored_layout in checks.h): what linear and
  // linear_backward take as `merged`, so that several calls can share it. They trust that it belongs to the other arguments.
  m.def(
      "merged_operand(Tensor weight, Tensor? mask, Tensor? index, Tensor lora_A, Tensor lora_B, float scaling, ScalarType "
      "dtype, int tokens, SymInt? rounding_seed=None, Tensor? noise=None, SymInt noise_seed=0,"
      " Tensor? scales=None, Tensor? zero_points=None, str grid=\"\", SymInt requantize_steps=0, SymInt dither_seed=-1)"
      " -> Tensor");

  // Y [T, N] = input merged^T + bias, in the input's dtype; merged is rounded once to the input's dtype and dropped, or given.
  m.def(
      "linear(Tensor input, Tensor weight, Tensor? mask, Tensor? index, Tensor lora_A, Tensor lora_B, Tensor? bias, float "
      "scaling,"
      " str gradient, Tensor? merged=None, SymInt? rounding_seed=None, Tensor? noise=None, SymInt noise_seed=0,"
      " Tensor? scales=None, Tensor? zero_points=None, str grid=\"\", SymInt requantize_steps=0, SymInt dither_seed=-1)"
      " -> Tensor");
  // What is not wanted comes back empty: `needs_*` say what is, and grad_bias is computed where `bias` is given.
  // `input` may be None when neither adapter needs a gradient.
  m.def(
      "linear_backward(Tensor grad_output, Tensor? input, Tensor weight, Tensor? mask, Tensor? index, Tensor lora_A, Tensor "
      "lora_B,"
      " Tensor? bias, float scaling, str gradient, bool needs_input_grad, bool needs_lora_A_grad, bool needs_lora_B_grad,"
      " Tensor? merged=None, SymInt? rounding_seed=None, Tensor? noise=None, SymInt noise_seed=0,"
      " Tensor? scales=None, Tensor? zero_points=None, str grid=\"\", SymInt requantize_steps=0, SymInt dither_seed=-1)"
      " -> (Tensor grad_input, Tensor grad_lora_A, Tensor grad_lora_B, Tensor grad_bias)");

  // linear for the experts of a mixture, each with its own rows (grouped_operators.h): weight [E N, K] in any layout, lora_A
  // [E, r, K], lora_B [E, N, r], bias [E, N]; offsets: int32 [E], where each expert's rows end; rows: int32 [S], which row of
  // the input each is, every one of them equally often, or None: the input's own. Y [S, N], zeros in rows beyond the last
  // offset. grad_input [S, K] is by these rows. Adapters of this shape give merge, merge_backward and merged_operand all
  // experts, [E N, K].
  m.def(
      "grouped_linear(Tensor input, Tensor offsets, Tensor weight, Tensor? mask, Tensor? index, Tensor lora_A, Tensor lora_B,"
      " Tensor? bias, float scaling, str gradient, Tensor? merged=None, Tensor? rows=None,"
      " Tensor? scales=None, Tensor? zero_points=None, str grid=\"\", SymInt requantize_steps=0, SymInt dither_seed=-1)"
      " -> Tensor");
  m.def(
      "grouped_linear_backward(Tensor grad_output, Tensor? input, Tensor offsets, Tensor weight, Tensor? mask, Tensor? index,"
      " Tensor lora_A, Tensor lora_B, Tensor? bias, float scaling, str gradient, bool needs_input_grad, bool "
      "needs_lora_A_grad,"
      " bool needs_lora_B_grad, Tensor? merged=None, Tensor? rows=None,"
      " Tensor? scales=None, Tensor? zero_points=None, str grid=\"\", SymInt requantize_steps=0, SymInt dither_seed=-1)"
      " -> (Tensor grad_input, Tensor grad_lora_A, Tensor grad_lora_B, Tensor grad_bias)");
  // The values of a 2:4 weight after the merge; its metadata stays.
  m.def("sparse24_merge(Tensor values, Tensor metadata, Tensor lora_A, Tensor lora_B, float scaling) -> Tensor");
  // The kept values of a dense weight row by row, -0.0 as +0.0. CPU only; lors_cuda/formats.py is the rest of compressing.
  m.def("compress(Tensor weight, Tensor mask) -> Tensor");
  m.def("release_scratch() -> int");  // frees the scratch memory that the CPU operators keep (cpu_scratch.h), returns its bytes
  m.def("build_info() -> str");       // JSON: what this binary is, what it found
}
