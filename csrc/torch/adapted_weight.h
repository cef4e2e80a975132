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

inline Tensor slice(Tensor t, int64_t dim, int64_t begin, int64_t count) { return torch::stable::narrow(t, dim, begin, count); }

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

// Where element `elements` of a row-major tensor lies.
inline const void* at(const Tensor& t, int64_t elements) {
  return static_cast<const char*>(t.const_data_ptr()) + elements * element_bytes(t.scalar_type());
}

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

// Makes the arguments row-major once, for all calls of the core. `backend` must outlive this. What it describes is all of the
// weight or, as rows() and expert() give it, some of its rows: N of them from `first_row` on. The tensors are whole in both.
template <typename Backend>
struct AdaptedWeight {
  AdaptedWeight(const char* op, const Backend& backend, const StoredWeight& stored, const Tensor& lora_A, const Tensor& lora_B,
                double scaling, const DrawArguments& draws = {})
      : op(op),
        backend(backend),
        layout(stored.layout),
        N(stored.out_features),
        K(stored.in_features),
        experts(stored.experts),
        codes_per_element(stored.codes_per_element()),
        weight(row_major(stored.values)),
        mask(row_major(stored.mask)),
        index(row_major(stored.index)),
        lora_A(row_major(lora_A)),
        lora_B(row_major(lora_B)),
        rank(lora_A.size(lora_A.dim() - 2)),
        scaling(scaling),
        noise(row_major(draws.noise)),
        scales(row_major(stored.quantization.scales)),
        zero_points(row_major(stored.quantization.zero_points)) {
    this->draws.rounds = draws.rounding_seed.has_value();
    this->draws.rounding_seed = static_cast<uint64_t>(draws.rounding_seed.value_or(0));
    this->draws.noise_seed = static_cast<uint64_t>(draws.noise_seed);
    if (noise) this->draws.noise = static_cast<const float*>(noise->const_data_ptr());
    if (experts == 0) check_offsets();
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
    rank = 0;
    draws = {};
    quantization = {};
  }

  // Rows [begin, begin + count) of these, with the same lora_A.
  AdaptedWeight rows(int64_t begin, int64_t count) const {
    AdaptedWeight some(*this);
    some.first_row += begin;
    some.N = count;
    return some;
  }

  // Expert e of a stack [experts N, K], with its own lora_A [r, K] and lora_B [N, r] of lora_A [experts, r, K] and lora_B
  // [experts, N, r]. Only what belongs to it is read and checked.
  AdaptedWeight expert(int64_t e) const {
    const int64_t rows_of_one = N / experts;
    AdaptedWeight one = rows(e * rows_of_one, rows_of_one);
    one.factor = e;
    one.experts = 0;
    one.check_offsets();
    return one;
  }

  // A matrix is one part; a stack has one for each expert.
  int64_t parts() const { return std::max<int64_t>(experts, 1); }
  AdaptedWeight part(int64_t e) const { return experts > 0 ? expert(e) : *this; }
  Tensor part(const Tensor& factor_or_gradient, int64_t e) const {
    return experts > 0 ? torch::stable::select(factor_or_gradient, 0, e) : factor_or_gradient;
  }

  int64_t out_features() const { return N; }
  int64_t in_features() const { return K; }
  int64_t r() const { return rank; }
  // Only the merge draws random numbers or requantises; fused_linear does neither.
  bool has_draws() const { return draws.rounds || draws.noise; }
  bool is_quantized() const { return quantization.grid != Grid::none; }

  // Fills in what MergeArgs and FusedLinearArgs have in common.
  template <typename Args>
  void describe(Args& args) const {
    args.out_features = out_features();
    args.in_features = in_features();
    args.r = r();
    args.weight = stored_values();
    args.weight_dtype = dtype_of(weight);
    args.weight_layout = layout;
    if (mask) args.mask = bits(*mask) + first_row * mask_words(K);
    if (layout == Layout::sparse24) args.metadata = metadata();
    if (layout == Layout::bitmap) args.row_offsets = static_cast<const int64_t*>(at(*index, first_row));
    args.quantization = quantization;
    if (is_quantized()) {
      const int64_t groups = first_row * scales->size(1);
      args.quantization.scales = at(*scales, groups);
      if (zero_points) args.quantization.zero_points = static_cast<const int8_t*>(at(*zero_points, groups));
      args.quantization.first_row = first_row;
    }
    describe_adapter(args);
  }

  template <typename Args>
  void describe_adapter(Args& args) const {
    args.lora_A = at(lora_A, factor * r() * K);
    args.lora_A_dtype = dtype_of(lora_A);
    args.lora_B = at(lora_B, first_row * r());
    args.lora_B_dtype = dtype_of(lora_B);
    args.scaling = scaling;
  }

  // out [N, K] = the merged rows, each value rounded once to `rounded`.
  void merge(Tensor& out, ScalarType rounded) const { merge(out.mutable_data_ptr(), dtype_of(out), rounded, Layout::dense); }

  // A new tensor of dtype `stored`: the merged weight, or, with `merged_layout` that of the weight and in its dtype, its
  // values: metadata and bits stay the same.
  Tensor merged(ScalarType stored, ScalarType rounded, Layout merged_layout = Layout::dense) const {
    const int64_t columns = merged_layout == Layout::bitmap ? 0 : merged_layout == Layout::dense ? K : K / 2;
    Tensor out = columns == 0 ? empty(weight, {weight.size(0)}, stored) : empty(weight, {N, columns}, stored);
    for (int64_t e = 0; e < parts(); ++e) {
      const AdaptedWeight one = part(e);
      auto* to = static_cast<char*>(out.mutable_data_ptr()) + one.first_row * columns * element_bytes(stored);
      one.merge(to, dtype_of(out), rounded, merged_layout);
    }
    return out;
  }

  // activation merged^T + bias [T, N], or activation merged [T, K] for the input gradient, each merged value rounded once to
  // activation's dtype, which the result has. `shared`: what lors::merged_operand made for these activations, if the caller has
  // it. `into`: row-major, where the result is put if it is computed in `into`'s dtype.
  Tensor multiply(const Tensor& activation, const std::optional<Tensor>& bias, bool input_gradient,
                  const std::optional<Tensor>& shared, const std::optional<Tensor>& into = std::nullopt) const {
    const auto output = [&](ScalarType computed) {
      return into && into->scalar_type() == computed
                 ? *into
                 : empty(activation, {activation.size(0), input_gradient ? K : N}, computed);
    };
    const auto rows_of = [&](const Tensor& whole) { return whole.size(0) == N ? whole : slice(whole, 0, first_row, N); };
    const ScalarType dtype = activation.scalar_type(), compute = Backend::matmul_dtype(dtype);
    if (shared && shared->scalar_type() == dtype)
      return AdaptedWeight(*this, *shared).multiply(activation, bias, input_gradient, std::nullopt, into);
    // Without an adapter a dense weight is its own merge.
    const bool own =
        r() == 0 && layout == Layout::dense && !mask && weight.scalar_type() == compute && compute == dtype && !has_draws();
    const bool is_merged_alone = has_draws() || quantization.requantize_steps != 0;
    if (shared || is_merged_alone || !backend.prefers_fused_linear(activation, *this, input_gradient, own)) {
      Tensor out = output(compute);
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
        multiply_by(rows_of(shared ? *shared : weight));
      } else if (panel_rows >= N) {
        Scratch<Backend> scratch(weight, N, K, compute);
        merge(scratch.tensor, dtype);
        multiply_by(scratch.tensor);
      } else {
        Scratch<Backend> scratch(weight, panel_rows, K, compute);
        for (int64_t begin = 0; begin < N; begin += panel_rows) {
          const int64_t count = std::min(panel_rows, N - begin);
          Tensor panel = slice(scratch.tensor, 0, 0, count), columns = slice(out, 1, begin, count);
          rows(begin, count).merge(panel, dtype);
          std::optional<Tensor> part;
          if (addend) part = slice(*addend, 0, begin, count);
          Backend::matmul(columns, tokens, torch::stable::transpose(panel, 0, 1), part);
        }
      }
      return to(out, dtype);
    }
    Tensor out = output(Backend::fused_output_dtype(dtype));
    std::optional<Tensor> addend;
    if (bias) addend = row_major(*bias, Backend::fused_bias_dtype(*bias));
    const Tensor tokens = row_major(activation);
    FusedLinearArgs args;
    describe(args);
    args.tokens = activation.size(0);
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
    describe_adapter(args);
    args.lora_A_grad = lora_A_grad ? lora_A_grad->mutable_data_ptr() : nullptr;
    args.lora_B_grad = lora_B_grad ? lora_B_grad->mutable_data_ptr() : nullptr;
  }

  // The same of the exact gradients; `kept`: what kept() returned.
  void describe_gradients(AdapterGradExactArgs& args, const Tensor& dY, const Tensor& X, Tensor* lora_A_grad,
                          Tensor* lora_B_grad, const uint32_t* kept) const {
    describe_gradients(args, dY, X, lora_A_grad, lora_B_grad);
    args.weight = kept ? nullptr : stored_values();
    args.weight_dtype = dtype_of(weight);
    args.mask = kept;
  }

  // The mask for the exact gradients: bits [N, ceil(K/32)], made from the metadata in `scratch` for 2:4; null for a dense
  // weight without a mask, whose nonzero entries are the mask.
  const uint32_t* kept(std::optional<Scratch<Backend>>& scratch) const {
    if (layout != Layout::sparse24) return mask ? bits(*mask) + first_row * mask_words(K) : nullptr;
    const Tensor& made = scratch.emplace(weight, N, mask_words(K), ScalarType::Int).tensor;
    Sparse24MaskArgs args;
    args.out_features = N;
    args.in_features = K;
    args.metadata = metadata();
    args.mask = static_cast<uint32_t*>(made.mutable_data_ptr());
    check_status(sparse24_mask(args, backend.host()));
    return bits(made);
  }

  // A new gradient of lora_A or lora_B, of `factor`'s shape and dtype; with no elements if it is not wanted.
  Tensor empty_gradient(const Tensor& factor, bool wanted = true) const {
    std::vector<int64_t> sizes(static_cast<size_t>(factor.dim()));
    for (int64_t i = 0; i < factor.dim(); ++i) sizes[static_cast<size_t>(i)] = i == 0 && !wanted ? 0 : factor.size(i);
    return torch::stable::new_empty(factor, sizes, factor.scalar_type());
  }

  // Contracts a gradient G [N, K] of these merged rows with the adapters: adds to lora_A_sum [K, r], writes lora_B_grad [N, r];
  // null: not computed. `kept`: what kept() returned, for these rows.
  void contract(const Tensor& G, const uint32_t* kept, Tensor* lora_A_sum, Tensor* lora_B_grad) const {
    MaskedContractArgs args;
    args.rows = N;
    args.in_features = K;
    args.r = r();
    args.grad_weight = G.const_data_ptr();
    args.grad_weight_dtype = dtype_of(G);
    args.weight = kept ? nullptr : stored_values();
    args.weight_dtype = dtype_of(weight);
    args.mask = kept;
    describe_adapter(args);
    args.lora_A_sum = lora_A_sum ? lora_A_sum->mutable_data_ptr() : nullptr;
    args.lora_B_grad = lora_B_grad ? lora_B_grad->mutable_data_ptr() : nullptr;
    check_status(masked_contract(args, backend.host()));
  }

  const char* op;
  const Backend& backend;
  Layout layout;
  int64_t N, K;
  int64_t experts;        // of a stack; 0: this is one matrix
  int64_t first_row = 0;  // of these N rows, in the tensors
  int64_t factor = 0;     // which lora_A of a stack
  int64_t codes_per_element;
  Tensor weight;
  std::optional<Tensor> mask, index;
  Tensor lora_A, lora_B;  // of no meaning where `rank` is 0
  int64_t rank;
  double scaling;
  std::optional<Tensor> noise;
  Draws draws;
  std::optional<Tensor> scales, zero_points;
  Quantization quantization;

 private:
  void check_offsets() const {
    if (layout == Layout::bitmap) Backend::check_offsets(op, weight.size(0), *mask, *index, K, codes_per_element, first_row, N);
  }

  // A bitmap's row offsets count from the first of all values.
  const void* stored_values() const {
    return layout == Layout::bitmap ? at(weight, 0) : at(weight, first_row * weight.size(1));
  }
  const uint8_t* metadata() const { return static_cast<const uint8_t*>(at(*index, first_row * index->size(1))); }

  // `to`: where the first row goes; of a bitmap's values, where those of row 0 of the whole weight do.
  void merge(void* to, DType stored, ScalarType rounded, Layout merged_layout) const {
    MergeArgs args;
    describe(args);
    args.merged_layout = merged_layout;
    args.draws = draws;
    args.merged = to;
    args.merged_dtype = stored;
    args.round_to = rounded == ScalarType::BFloat16 ? DType::bfloat16 : rounded == ScalarType::Half ? DType::float16 : stored;
    check_status(lors::merge(args, backend.host()));
  }
};

}  // namespace lors::binding
