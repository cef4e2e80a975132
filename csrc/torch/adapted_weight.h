// SPDX-License-Identifier: Apache-2.0
// A frozen weight with its adapter, and the operators' calls of the core with it, the same on every device. `Backend` is what
// differs between devices: see operators.h; cpu_ops.cpp and cuda_ops.cpp each define one.
#pragma once

#include <lors/adapter_grad.h>
#include <lors/fused_linear.h>
#include <lors/merge.h>
#include <lors/sparse24.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"

namespace lors::binding {

inline void check_status(const Status& status) { check(status.ok(), status.message()); }

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> size, ScalarType dtype) {
  const std::vector<int64_t> sizes(size);
  return torch::stable::new_empty(like, sizes, dtype);
}

inline Tensor to(const Tensor& t, ScalarType dtype) { return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype); }

// A temporary in `dtype` with the values of `t`, row-major. Asking first spares a call through the dispatcher, of which a
// linear would make five for nothing.
inline Tensor row_major(const Tensor& t, std::optional<ScalarType> dtype = std::nullopt) {
  const Tensor converted = dtype ? to(t, *dtype) : t;
  return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
}

inline std::optional<Tensor> row_major(const std::optional<Tensor>& mask) {
  return mask ? std::optional(row_major(*mask)) : std::nullopt;
}

inline const uint32_t* bits(const Tensor& mask) { return static_cast<const uint32_t*>(mask.const_data_ptr()); }

inline const uint32_t* bits(const std::optional<Tensor>& mask) { return mask ? bits(*mask) : nullptr; }

// The dtype in which matmuls with `weight` accumulate.
inline ScalarType accumulation_dtype(const Tensor& weight) {
  return weight.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A temporary [rows, columns] on the device of `like`. It is never returned: the next call uses its memory again.
template <typename Backend>
class Scratch {
 public:
  Scratch(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype)
      : tensor(torch::stable::from_blob(Backend::allocate(rows * columns * element_bytes(dtype), &handle_), {rows, columns},
                                        {columns, 1}, like.device(), dtype)) {}
  ~Scratch() { Backend::release(handle_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

 private:
  void* handle_ = nullptr;

 public:
  Tensor tensor;
};

// Makes the arguments row-major once, for all calls of the core. `backend` must outlive this.
template <typename Backend>
struct AdaptedWeight {
  AdaptedWeight(const char* op, const Backend& backend, const StoredWeight& stored, const Tensor& lora_A, const Tensor& lora_B,
                double scaling, const DrawArguments& draws = {})
      : backend(backend),
        layout(stored.layout),
        N(stored.out_features),
        K(stored.in_features),
        weight(row_major(stored.values)),
        mask(row_major(stored.mask)),
        index(row_major(stored.index)),
        lora_A(row_major(lora_A)),
        lora_B(row_major(lora_B)),
        scaling(scaling),
        noise(row_major(draws.noise)),
        scales(row_major(stored.quantization.scales)),
        zero_points(row_major(stored.quantization.zero_points)) {
    this->draws.rounds = draws.rounding_seed.has_value();
    this->draws.rounding_seed = static_cast<uint64_t>(draws.rounding_seed.value_or(0));
    this->draws.noise_seed = static_cast<uint64_t>(draws.noise_seed);
    if (noise) this->draws.noise = static_cast<const float*>(noise->const_data_ptr());
    const int64_t per_element = stored.codes_per_element();
    if (layout == Layout::bitmap) Backend::check_offsets(op, weight.size(0), *mask, *index, K, per_element);
    if (!stored.kind) return;
    quantization.grid = stored.kind->grid;
    quantization.group = K / scales->size(1);
    quantization.scales = scales->const_data_ptr();
    quantization.scales_dtype = dtype_of(*scales);
    if (zero_points) quantization.zero_points = static_cast<const int8_t*>(zero_points->const_data_ptr());
    quantization.requantize_steps = stored.quantization.requantize_steps;
    quantization.dither_seed = stored.quantization.dither_seed;
  }

  // `adapted` after its merge, without an adapter: `merged` is dense, or values of its layout.
  AdaptedWeight(const AdaptedWeight& adapted, const Tensor& merged) : AdaptedWeight(adapted) {
    if (merged.dim() == 2 && merged.size(1) == K) {
      layout = Layout::dense;
      mask = index = std::nullopt;
    }
    weight = merged;
    lora_A = torch::stable::narrow(lora_A, 0, 0, 0);
    lora_B = torch::stable::narrow(lora_B, 1, 0, 0);
    draws = {};
    quantization = {};
  }

  int64_t out_features() const { return N; }
  int64_t in_features() const { return K; }
  int64_t r() const { return lora_A.size(0); }
  // Only the merge draws random numbers or requantises; fused_linear does neither.
  bool has_draws() const { return draws.rounds || draws.noise; }
  bool is_quantized() const { return quantization.grid != Grid::none; }

  // Fills in what MergeArgs and FusedLinearArgs have in common.
  template <typename Args>
  void describe(Args& args) const {
    args.out_features = out_features();
    args.in_features = in_features();
    args.r = r();
    args.weight = weight.const_data_ptr();
    args.weight_dtype = dtype_of(weight);
    args.mask = bits(mask);
    args.weight_layout = layout;
    args.quantization = quantization;
    if (layout == Layout::sparse24) args.metadata = static_cast<const uint8_t*>(index->const_data_ptr());
    if (layout == Layout::bitmap) args.row_offsets = static_cast<const int64_t*>(index->const_data_ptr());
    args.lora_A = lora_A.const_data_ptr();
    args.lora_A_dtype = dtype_of(lora_A);
    args.lora_B = lora_B.const_data_ptr();
    args.lora_B_dtype = dtype_of(lora_B);
    args.scaling = scaling;
  }

  // out [N, K] = the merged weight, each value rounded once to `rounded`; or, with `merged_layout` that of the weight and in
  // its dtype, its values: metadata and bits stay the same.
  void merge(Tensor& out, ScalarType rounded, Layout merged_layout = Layout::dense) const {
    MergeArgs args;
    describe(args);
    merge(args, out, rounded, merged_layout);
  }

  // Rows [begin, begin + out.size(0)) of the same, dense.
  void merge_rows(Tensor& out, ScalarType rounded, int64_t begin) const {
    MergeArgs args;
    describe(args);
    const auto skip = [](const void* p, int64_t elements, DType dtype) {
      return static_cast<const char*>(p) + elements * dtype_size(dtype);
    };
    args.out_features = out.size(0);
    args.lora_B = skip(args.lora_B, begin * args.r, args.lora_B_dtype);
    if (args.mask) args.mask += begin * mask_words(K);
    if (args.metadata) args.metadata += begin * sparse24_metadata_bytes(K);
    if (args.row_offsets) args.row_offsets += begin;
    const int64_t elements = begin * (layout == Layout::sparse24 ? K / 2 : K);
    if (is_quantized()) {
      Quantization& of_rows = args.quantization;
      const int64_t groups = begin * (K / of_rows.group);
      of_rows.scales = skip(of_rows.scales, groups, of_rows.scales_dtype);
      if (of_rows.zero_points) of_rows.zero_points += groups;
      of_rows.first_row += begin;
      if (layout != Layout::bitmap)
        args.weight = static_cast<const char*>(args.weight) + elements / (of_rows.grid == Grid::int4 ? 2 : 1);
    } else if (layout != Layout::bitmap) {
      args.weight = skip(args.weight, elements, args.weight_dtype);
    }
    merge(args, out, rounded, Layout::dense);
  }

  void merge(MergeArgs& args, Tensor& out, ScalarType rounded, Layout merged_layout) const {
    args.merged_layout = merged_layout;
    args.draws = draws;
    args.merged = out.mutable_data_ptr();
    args.merged_dtype = dtype_of(out);
    args.round_to = rounded == ScalarType::BFloat16 ? DType::bfloat16
                    : rounded == ScalarType::Half   ? DType::float16
                                                    : dtype_of(out);
    check_status(lors::merge(args, backend.host()));
  }

  // The same as a new tensor of dtype `stored`.
  Tensor merged(ScalarType stored, ScalarType rounded, Layout merged_layout = Layout::dense) const {
    Tensor out = merged_layout == Layout::bitmap ? empty(weight, {weight.size(0)}, stored)
                                                 : empty(weight, {N, merged_layout == Layout::dense ? K : K / 2}, stored);
    merge(out, rounded, merged_layout);
    return out;
  }

  // activation merged^T + bias [T, N], or activation merged [T, K] for the input gradient, each merged value rounded once to
  // activation's dtype, which the result has. `shared`: what lors::merged_operand made for these activations, if the caller has
  // it.
  Tensor multiply(const Tensor& activation, const std::optional<Tensor>& bias, bool input_gradient,
                  const std::optional<Tensor>& shared) const {
    const ScalarType dtype = activation.scalar_type(), compute = Backend::matmul_dtype(dtype);
    const int64_t T = activation.size(0), columns = input_gradient ? K : N;
    if (shared && shared->scalar_type() == dtype)
      return AdaptedWeight(*this, *shared).multiply(activation, bias, input_gradient, std::nullopt);
    // Without an adapter a dense weight is its own merge.
    const bool own =
        r() == 0 && layout == Layout::dense && !mask && weight.scalar_type() == compute && compute == dtype && !has_draws();
    const bool is_merged_alone = has_draws() || quantization.requantize_steps != 0;
    if (shared || is_merged_alone || !backend.prefers_fused_linear(activation, *this, input_gradient, own)) {
      Tensor out = empty(activation, {T, columns}, compute);
      std::optional<Tensor> addend;
      if (bias) addend = row_major(*bias, compute);
      const Tensor tokens = to(activation, compute);
      const auto multiply_by = [&](const Tensor& merged) {
        Backend::matmul(out, tokens, input_gradient ? merged : torch::stable::transpose(merged, 0, 1), addend);
      };
      // Rows of the weight give columns of the output; of the input gradient every row of the weight is a part.
      // What is drawn belongs to a row's number in the whole weight.
      const bool is_whole = input_gradient || has_draws();
      const int64_t panel_rows = is_whole ? N : std::max<int64_t>(Backend::merged_rows(K, compute), 1);
      if (shared || own) {
        multiply_by(shared ? *shared : weight);
      } else if (panel_rows >= N) {
        Scratch<Backend> scratch(weight, N, K, compute);
        merge(scratch.tensor, dtype);
        multiply_by(scratch.tensor);
      } else {
        Scratch<Backend> scratch(weight, panel_rows, K, compute);
        for (int64_t begin = 0; begin < N; begin += panel_rows) {
          const int64_t rows = std::min(panel_rows, N - begin);
          Tensor panel = torch::stable::narrow(scratch.tensor, 0, 0, rows),
                 columns = torch::stable::narrow(out, 1, begin, rows);
          merge_rows(panel, dtype, begin);
          std::optional<Tensor> part;
          if (addend) part = torch::stable::narrow(*addend, 0, begin, rows);
          Backend::matmul(columns, tokens, torch::stable::transpose(panel, 0, 1), part);
        }
      }
      return to(out, dtype);
    }
    Tensor out = empty(activation, {T, columns}, Backend::fused_output_dtype(dtype));
    std::optional<Tensor> addend;
    if (bias) addend = row_major(*bias, Backend::fused_bias_dtype(*bias));
    const Tensor tokens = row_major(activation);
    FusedLinearArgs args;
    describe(args);
    args.tokens = T;
    args.input_gradient = input_gradient;
    args.activation = tokens.const_data_ptr();
    args.activation_dtype = dtype_of(tokens);
    args.round_to = dtype_of(activation);
    args.bias = addend ? addend->const_data_ptr() : nullptr;
    args.bias_dtype = addend ? dtype_of(*addend) : DType::float32;
    args.output = out.mutable_data_ptr();
    args.output_dtype = dtype_of(out);
    check_status(lors::fused_linear(args, backend.host()));
    return to(out, dtype);
  }

  // Fills in what AdapterGradArgs and AdapterGradExactArgs have in common; a null gradient is not computed.
  void describe_gradients(AdapterGradArgs& args, const Tensor& dY, const Tensor& X, Tensor* lora_A_grad,
                          Tensor* lora_B_grad) const {
    args.tokens = X.size(0);
    args.out_features = out_features();
    args.in_features = in_features();
    args.r = r();
    args.grad_output = dY.const_data_ptr();
    args.grad_output_dtype = dtype_of(dY);
    args.input = X.const_data_ptr();
    args.input_dtype = dtype_of(X);
    args.lora_A = lora_A.const_data_ptr();
    args.lora_A_dtype = dtype_of(lora_A);
    args.lora_B = lora_B.const_data_ptr();
    args.lora_B_dtype = dtype_of(lora_B);
    args.scaling = scaling;
    args.lora_A_grad = lora_A_grad ? lora_A_grad->mutable_data_ptr() : nullptr;
    args.lora_B_grad = lora_B_grad ? lora_B_grad->mutable_data_ptr() : nullptr;
  }

  // The same of the exact gradients; `kept`: what kept() returned.
  void describe_gradients(AdapterGradExactArgs& args, const Tensor& dY, const Tensor& X, Tensor* lora_A_grad,
                          Tensor* lora_B_grad, const std::optional<Tensor>& kept) const {
    describe_gradients(args, dY, X, lora_A_grad, lora_B_grad);
    args.weight = kept ? nullptr : weight.const_data_ptr();
    args.weight_dtype = dtype_of(weight);
    args.mask = bits(kept);
  }

  // The mask for the exact gradients: bits [N, ceil(K/32)], made from the metadata in `scratch` for 2:4; nothing for a dense
  // weight without a mask, whose nonzero entries are the mask.
  std::optional<Tensor> kept(std::optional<Scratch<Backend>>& scratch) const {
    if (layout != Layout::sparse24) return mask;
    const Tensor& bits = scratch.emplace(weight, N, mask_words(K), ScalarType::Int).tensor;
    Sparse24MaskArgs args;
    args.out_features = N;
    args.in_features = K;
    args.metadata = static_cast<const uint8_t*>(index->const_data_ptr());
    args.mask = static_cast<uint32_t*>(bits.mutable_data_ptr());
    check_status(sparse24_mask(args, backend.host()));
    return bits;
  }

  // Contracts rows [begin, begin + G.size(0)) of a gradient of merged with the adapters: adds to lora_A_sum [K, r], writes
  // those rows of lora_B_grad [N, r]; null: not computed. `kept`: what kept() returned.
  void contract(const Tensor& G, int64_t begin, const std::optional<Tensor>& kept, Tensor* lora_A_sum,
                Tensor* lora_B_grad) const {
    const auto row = [&](const Tensor& t) {
      return static_cast<char*>(const_cast<void*>(t.const_data_ptr())) + begin * t.size(1) * dtype_size(dtype_of(t));
    };
    MaskedContractArgs args;
    args.rows = G.size(0);
    args.in_features = in_features();
    args.r = r();
    args.grad_weight = G.const_data_ptr();
    args.grad_weight_dtype = dtype_of(G);
    args.weight = kept ? nullptr : row(weight);
    args.weight_dtype = dtype_of(weight);
    args.mask = kept ? bits(kept) + begin * mask_words(in_features()) : nullptr;
    args.lora_A = lora_A.const_data_ptr();
    args.lora_A_dtype = dtype_of(lora_A);
    args.lora_B = row(lora_B);
    args.lora_B_dtype = dtype_of(lora_B);
    args.scaling = scaling;
    args.lora_A_sum = lora_A_sum ? lora_A_sum->mutable_data_ptr() : nullptr;
    args.lora_B_grad = lora_B_grad ? row(*lora_B_grad) : nullptr;
    check_status(masked_contract(args, backend.host()));
  }

  const Backend& backend;
  Layout layout;
  int64_t N, K;
  Tensor weight;
  std::optional<Tensor> mask, index;
  Tensor lora_A, lora_B;
  double scaling;
  std::optional<Tensor> noise;
  Draws draws;
  std::optional<Tensor> scales, zero_points;
  Quantization quantization;
};

}  // namespace lors::binding
