// SPDX-License-Identifier: Apache-2.0
// The operators on the CPU: check once, allocate with torch, call the core; the large products go to torch's own mm.
// They call it below the dispatcher (aoti_torch_cpu_*), so that autocast and autograd cannot step in between.
#include <lors/adapter_grad.h>
#include <lors/cpu.h>
#include <lors/fused_linear.h>
#include <lors/mask.h>
#include <lors/merge.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "build_info.h"
#include "checks.h"

namespace lors::binding {
namespace {

void check_status(const Status& status) { check(status.ok(), status.message()); }

// Threads and memory of the core are torch's own: its pool, and tensors of bytes, so that torch's settings and memory
// profilers cover them too.
void run_on_torch_threads(int64_t count, int64_t grain, CpuHost::Body body, void* context) {
  torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

void* allocate_from_torch(int64_t bytes, void** handle) {
  const int64_t stride = 1;
  AtenTensorHandle tensor = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, &bytes, &stride, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(), 0, &tensor));
  void* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &data));
  *handle = tensor;
  return data;
}

void release_to_torch(void* handle) { aoti_torch_delete_tensor_object(static_cast<AtenTensorHandle>(handle)); }

constexpr CpuHost kTorch{run_on_torch_threads, allocate_from_torch, release_to_torch};

Tensor empty(const Tensor& like, std::initializer_list<int64_t> size, ScalarType dtype) {
  const std::vector<int64_t> sizes(size);
  return torch::stable::new_empty(like, sizes, dtype);
}

Tensor to(const Tensor& t, ScalarType dtype) { return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype); }

// A temporary in `dtype` with the values of `t`, row-major.
Tensor row_major(const Tensor& t, std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::contiguous(dtype ? to(t, *dtype) : t);
}

const uint32_t* bits(const std::optional<Tensor>& mask) {
  return mask ? static_cast<const uint32_t*>(mask->const_data_ptr()) : nullptr;
}

std::optional<Tensor> row_major(const std::optional<Tensor>& mask) {
  return mask ? std::optional(torch::stable::contiguous(*mask)) : std::nullopt;
}

// The type a product of `activation` runs in, and so the type its scratch is stored in: see cpu_multiplies_natively.
ScalarType product_dtype(ScalarType activation) {
  if (activation == ScalarType::BFloat16 && !cpu_multiplies_natively(DType::bfloat16)) return ScalarType::Float;
  if (activation == ScalarType::Half && !cpu_multiplies_natively(DType::float16)) return ScalarType::Float;
  return activation;
}

// out = a b (+ bias broadcast over rows); all three in one type.
void product(Tensor& out, const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias = std::nullopt) {
  if (bias) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), bias->get(), a.get(), b.get(), 1.0, 1.0));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  }
}

// A frozen weight with its live adapter, made row-major once.
struct AdaptedWeight {
  AdaptedWeight(const Tensor& weight, const std::optional<Tensor>& mask, const Tensor& lora_A, const Tensor& lora_B,
                double scaling)
      : weight(row_major(weight)),
        mask(row_major(mask)),
        lora_A(row_major(lora_A)),
        lora_B(row_major(lora_B)),
        scaling(scaling) {}

  int64_t out_features() const { return weight.size(0); }
  int64_t in_features() const { return weight.size(1); }
  int64_t r() const { return lora_A.size(0); }

  // Fills in what MergeArgs and FusedLinearArgs have in common.
  template <typename Args>
  void describe(Args& args) const {
    args.out_features = out_features();
    args.in_features = in_features();
    args.r = r();
    args.weight = weight.const_data_ptr();
    args.weight_dtype = dtype_of(weight);
    args.mask = bits(mask);
    args.lora_A = lora_A.const_data_ptr();
    args.lora_A_dtype = dtype_of(lora_A);
    args.lora_B = lora_B.const_data_ptr();
    args.lora_B_dtype = dtype_of(lora_B);
    args.scaling = scaling;
  }

  // merged [N, K], stored as `stored`, each value rounded once to `rounded`.
  Tensor merged(ScalarType stored, ScalarType rounded) const {
    Tensor out = empty(weight, {out_features(), in_features()}, stored);
    MergeArgs args;
    describe(args);
    args.merged = out.mutable_data_ptr();
    args.merged_dtype = dtype_of(out);
    args.round_to = rounded == ScalarType::BFloat16 ? DType::bfloat16
                    : rounded == ScalarType::Half   ? DType::float16
                                                    : dtype_of(out);
    check_status(lors::merge(args, &kTorch));
    return out;
  }

  // out = activation merged^T + bias, or activation merged for the input gradient, each merged value rounded once to
  // activation's dtype. `out` [T, N or K] is float32 unless the product runs in activation's own type.
  void multiply(Tensor& out, const Tensor& activation, const std::optional<Tensor>& bias, bool input_gradient) const {
    const ScalarType dtype = activation.scalar_type(), compute = out.scalar_type();
    const std::optional<Tensor> addend = bias ? std::optional(row_major(*bias, compute)) : std::nullopt;
    if (compute != ScalarType::Float || !cpu_prefers_fused_linear(activation.size(0))) {
      const Tensor merged = this->merged(compute, dtype);
      return product(out, to(activation, compute), input_gradient ? merged : torch::stable::transpose(merged, 0, 1), addend);
    }
    const Tensor tokens = row_major(activation);
    FusedLinearArgs args;
    describe(args);
    args.tokens = tokens.size(0);
    args.input_gradient = input_gradient;
    args.activation = tokens.const_data_ptr();
    args.activation_dtype = dtype_of(tokens);
    args.round_to = dtype_of(activation);
    args.bias = addend ? addend->const_data_ptr() : nullptr;
    args.output = out.mutable_data_ptr();
    check_status(fused_linear(args, &kTorch));
  }

  // Contracts rows [begin, begin + G.size(0)) of a gradient of merged with the adapters: adds to lora_A_sum [K, r], writes
  // those rows of lora_B_grad [N, r]; null: not wanted.
  void contract(const Tensor& G, int64_t begin, Tensor* lora_A_sum, Tensor* lora_B_grad) const {
    const auto row = [&](const Tensor& t) {
      return static_cast<char*>(const_cast<void*>(t.const_data_ptr())) + begin * t.size(1) * dtype_size(dtype_of(t));
    };
    MaskedContractArgs args;
    args.rows = G.size(0);
    args.in_features = in_features();
    args.r = r();
    args.grad_weight = G.const_data_ptr();
    args.grad_weight_dtype = dtype_of(G);
    args.weight = row(weight);
    args.weight_dtype = dtype_of(weight);
    args.mask = mask ? bits(mask) + begin * mask_words(in_features()) : nullptr;
    args.lora_A = lora_A.const_data_ptr();
    args.lora_A_dtype = dtype_of(lora_A);
    args.lora_B = row(lora_B);
    args.lora_B_dtype = dtype_of(lora_B);
    args.scaling = scaling;
    args.lora_A_sum = lora_A_sum ? lora_A_sum->mutable_data_ptr() : nullptr;
    args.lora_B_grad = lora_B_grad ? row(*lora_B_grad) : nullptr;
    check_status(masked_contract(args, &kTorch));
  }

  Tensor weight;
  std::optional<Tensor> mask;
  Tensor lora_A, lora_B;
  double scaling;
};

Tensor merge(const Tensor& weight, const std::optional<Tensor>& mask, const Tensor& lora_A, const Tensor& lora_B,
             double scaling) {
  check_adapted_weight("merge", weight, mask, lora_A, lora_B);
  return AdaptedWeight(weight, mask, lora_A, lora_B, scaling).merged(weight.scalar_type(), weight.scalar_type());
}

Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& mask, const Tensor& lora_A,
              const Tensor& lora_B, const std::optional<Tensor>& bias, double scaling, const std::string& gradient) {
  check_adapted_weight("linear", weight, mask, lora_A, lora_B);
  check_tokens("linear", "input", input, weight, weight.size(1));
  is_exact("linear", gradient);
  if (bias) check_bias("linear", *bias, weight);
  const ScalarType dtype = input.scalar_type(), compute = product_dtype(dtype);
  Tensor output = empty(input, {input.size(0), weight.size(0)}, compute);
  if (input.size(0) == 0) return to(output, dtype);
  AdaptedWeight(weight, mask, lora_A, lora_B, scaling).multiply(output, input, bias, false);
  return to(output, dtype);
}

// dA, dB of the true forward: the weight's gradient is formed by panels of rows, masked and contracted, and dropped.
void adapter_grad_exact(const Tensor& grad_output, const Tensor& input, const AdaptedWeight& adapted, Tensor* grad_lora_A,
                        Tensor* grad_lora_B) {
  // 4 MiB of float32 stays in the last-level cache between the product and the contraction.
  constexpr int64_t kPanelElements = 1 << 20;
  const int64_t N = adapted.out_features(), K = adapted.in_features(), r = adapted.r();
  const ScalarType acc = adapted.weight.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const int64_t panel_rows = std::clamp<int64_t>(kPanelElements / K, 1, N);
  const Tensor dY = to(grad_output, acc), X = to(input, acc);
  Tensor lora_A_sum = torch::stable::new_zeros(X, std::vector<int64_t>{K, r}, acc);
  Tensor panel = empty(X, {panel_rows, K}, acc);
  for (int64_t begin = 0; begin < N; begin += panel_rows) {
    const int64_t rows = std::min(panel_rows, N - begin);
    Tensor grad_weight = torch::stable::narrow(panel, 0, 0, rows);
    product(grad_weight, torch::stable::transpose(torch::stable::narrow(const_cast<Tensor&>(dY), 1, begin, rows), 0, 1), X);
    adapted.contract(grad_weight, begin, grad_lora_A ? &lora_A_sum : nullptr, grad_lora_B);
  }
  if (grad_lora_A) torch::stable::copy_(*grad_lora_A, torch::stable::transpose(lora_A_sum, 0, 1));
}

// (dA, dB); what is not wanted comes back with no elements.
std::tuple<Tensor, Tensor> adapter_grad(const Tensor& grad_output, const Tensor& input, const AdaptedWeight& adapted,
                                        bool exact, bool needs_lora_A_grad, bool needs_lora_B_grad) {
  const int64_t N = adapted.out_features(), K = adapted.in_features(), r = adapted.r();
  Tensor grad_lora_A = empty(adapted.lora_A, {needs_lora_A_grad ? r : 0, K}, adapted.lora_A.scalar_type());
  Tensor grad_lora_B = empty(adapted.lora_B, {needs_lora_B_grad ? N : 0, r}, adapted.lora_B.scalar_type());
  if (!needs_lora_A_grad && !needs_lora_B_grad) return {grad_lora_A, grad_lora_B};
  if (input.size(0) == 0) {
    return {torch::stable::zero_(grad_lora_A), torch::stable::zero_(grad_lora_B)};
  }
  if (exact) {
    adapter_grad_exact(grad_output, input, adapted, needs_lora_A_grad ? &grad_lora_A : nullptr,
                       needs_lora_B_grad ? &grad_lora_B : nullptr);
    return {grad_lora_A, grad_lora_B};
  }
  const Tensor dY = row_major(grad_output), X = row_major(input);
  AdapterGradArgs args;
  args.tokens = X.size(0);
  args.out_features = N;
  args.in_features = K;
  args.r = r;
  args.grad_output = dY.const_data_ptr();
  args.grad_output_dtype = dtype_of(dY);
  args.input = X.const_data_ptr();
  args.input_dtype = dtype_of(X);
  args.lora_A = adapted.lora_A.const_data_ptr();
  args.lora_A_dtype = dtype_of(adapted.lora_A);
  args.lora_B = adapted.lora_B.const_data_ptr();
  args.lora_B_dtype = dtype_of(adapted.lora_B);
  args.scaling = adapted.scaling;
  args.lora_A_grad = needs_lora_A_grad ? grad_lora_A.mutable_data_ptr() : nullptr;
  args.lora_B_grad = needs_lora_B_grad ? grad_lora_B.mutable_data_ptr() : nullptr;
  check_status(adapter_grad_lors(args, &kTorch));
  return {grad_lora_A, grad_lora_B};
}

void check_gradients(const char* op, const Tensor& grad_output, const Tensor& input, const Tensor& weight) {
  check_tokens(op, "input", input, weight, weight.size(1));
  check(grad_output.size(0) == input.size(0), "lors::", op, ": grad_output has ", grad_output.size(0), " tokens and input ",
        input.size(0), "; they must be the same.");
}

std::tuple<Tensor, Tensor> adapter_grad_op(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                           const std::optional<Tensor>& mask, const Tensor& lora_A, const Tensor& lora_B,
                                           double scaling, const std::string& gradient, bool needs_lora_A_grad,
                                           bool needs_lora_B_grad) {
  check_adapted_weight("adapter_grad", weight, mask, lora_A, lora_B);
  check_tokens("adapter_grad", "grad_output", grad_output, weight, weight.size(0));
  check_gradients("adapter_grad", grad_output, input, weight);
  return adapter_grad(grad_output, input, AdaptedWeight(weight, mask, lora_A, lora_B, scaling),
                      is_exact("adapter_grad", gradient), needs_lora_A_grad, needs_lora_B_grad);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_backward(const Tensor& grad_output, const std::optional<Tensor>& input,
                                                           const Tensor& weight, const std::optional<Tensor>& mask,
                                                           const Tensor& lora_A, const Tensor& lora_B,
                                                           const std::optional<Tensor>& bias, double scaling,
                                                           const std::string& gradient, bool needs_input_grad,
                                                           bool needs_lora_A_grad, bool needs_lora_B_grad) {
  check_adapted_weight("linear_backward", weight, mask, lora_A, lora_B);
  check_tokens("linear_backward", "grad_output", grad_output, weight, weight.size(0));
  const bool exact = is_exact("linear_backward", gradient);
  check(input || (!needs_lora_A_grad && !needs_lora_B_grad),
        "lors::linear_backward: input is None; it is needed for the gradients of lora_A and lora_B.");
  if (input) check_gradients("linear_backward", grad_output, *input, weight);
  if (bias) check_bias("linear_backward", *bias, weight);

  const AdaptedWeight adapted(weight, mask, lora_A, lora_B, scaling);
  const int64_t T = grad_output.size(0), N = weight.size(0), K = weight.size(1);
  const ScalarType dtype = grad_output.scalar_type(), compute = product_dtype(dtype);

  Tensor grad_input = empty(grad_output, {needs_input_grad ? T : 0, K}, compute);
  if (needs_input_grad && T > 0) adapted.multiply(grad_input, grad_output, std::nullopt, true);

  auto [grad_lora_A, grad_lora_B] =
      adapter_grad(grad_output, input.value_or(grad_output), adapted, exact, needs_lora_A_grad, needs_lora_B_grad);

  Tensor grad_bias = empty(grad_output, {bias ? N : 0}, bias ? bias->scalar_type() : dtype);
  if (bias) {
    const Tensor dY = row_major(grad_output);
    BiasGradArgs args;
    args.tokens = T;
    args.out_features = N;
    args.grad_output = dY.const_data_ptr();
    args.grad_output_dtype = dtype_of(dY);
    args.bias_grad = grad_bias.mutable_data_ptr();
    args.bias_grad_dtype = dtype_of(grad_bias);
    check_status(bias_grad(args, &kTorch));
  }
  return {to(grad_input, dtype), grad_lora_A, grad_lora_B, grad_bias};
}

std::tuple<Tensor, Tensor> merge_backward(const Tensor& grad_merged, const Tensor& weight, const std::optional<Tensor>& mask,
                                          const Tensor& lora_A, const Tensor& lora_B, double scaling) {
  check_adapted_weight("merge_backward", weight, mask, lora_A, lora_B);
  check(grad_merged.dim() == 2 && grad_merged.size(0) == weight.size(0) && grad_merged.size(1) == weight.size(1),
        "lors::merge_backward: grad_merged has shape ", shape(grad_merged), "; it must be ", shape(weight), ".");
  check(grad_merged.scalar_type() == weight.scalar_type(), "lors::merge_backward: grad_merged must have the weight's dtype.");
  check_same_device("merge_backward", "grad_merged", grad_merged, weight);
  check_storage("merge_backward", "grad_merged", grad_merged);
  const AdaptedWeight adapted(weight, mask, lora_A, lora_B, scaling);
  const int64_t N = weight.size(0), K = weight.size(1), r = adapted.r();
  const ScalarType acc = weight.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor G = row_major(grad_merged);
  Tensor grad_lora_A = empty(lora_A, {r, K}, lora_A.scalar_type());
  Tensor grad_lora_B = empty(lora_B, {N, r}, lora_B.scalar_type());
  Tensor lora_A_sum = torch::stable::new_zeros(weight, std::vector<int64_t>{K, r}, acc);
  adapted.contract(G, 0, &lora_A_sum, &grad_lora_B);
  torch::stable::copy_(grad_lora_A, torch::stable::transpose(lora_A_sum, 0, 1));
  return {grad_lora_A, grad_lora_B};
}

Tensor mask_pack(const Tensor& mask) {
  check(mask.dim() == 2 && mask.scalar_type() == ScalarType::Bool, "lors::mask_pack: mask has shape ", shape(mask),
        "; it must be a bool tensor [out_features, in_features].");
  check_storage("mask_pack", "mask", mask);
  const Tensor contiguous = row_major(mask);
  Tensor packed = empty(mask, {mask.size(0), mask_words(mask.size(1))}, ScalarType::Int);
  MaskPackArgs args;
  args.out_features = mask.size(0);
  args.in_features = mask.size(1);
  args.mask = static_cast<const uint8_t*>(contiguous.const_data_ptr());
  args.bits = static_cast<uint32_t*>(packed.mutable_data_ptr());
  check_status(lors::mask_pack(args, &kTorch));
  return packed;
}

Tensor mask_unpack(const Tensor& packed, int64_t in_features) {
  check(packed.dim() == 2 && packed.scalar_type() == ScalarType::Int && in_features >= 0 &&
            packed.size(1) == mask_words(in_features),
        "lors::mask_unpack: bits has shape ", shape(packed), "; it must be int32 [out_features, ", mask_words(in_features),
        "] for in_features = ", in_features, ".");
  check_storage("mask_unpack", "bits", packed);
  const Tensor contiguous = row_major(packed);
  Tensor mask = empty(packed, {packed.size(0), in_features}, ScalarType::Bool);
  MaskUnpackArgs args;
  args.out_features = packed.size(0);
  args.in_features = in_features;
  args.bits = static_cast<const uint32_t*>(contiguous.const_data_ptr());
  args.mask = static_cast<uint8_t*>(mask.mutable_data_ptr());
  check_status(lors::mask_unpack(args, &kTorch));
  return mask;
}

std::string build_info() {
  std::ostringstream out;
  out << "{\"version\": \"" << LORS_VERSION << "\", \"compiler\": \"" << LORS_COMPILER << "\", \"cuda_version\": \""
      << LORS_CUDA_VERSION << "\", \"cuda_archs\": \"" << LORS_CUDA_ARCHS << "\", \"cpu_capability\": \"" << cpu_capability()
      << "\", \"cpu_product_bfloat16\": \"" << (cpu_multiplies_natively(DType::bfloat16) ? "bfloat16" : "float32")
      << "\", \"cpu_product_float16\": \"" << (cpu_multiplies_natively(DType::float16) ? "float16" : "float32") << "\"}";
  return out.str();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lors, CPU, m) {
  m.impl("merge", TORCH_BOX(&merge));
  m.impl("merge_backward", TORCH_BOX(&merge_backward));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
  m.impl("adapter_grad", TORCH_BOX(&adapter_grad_op));
  m.impl("mask_pack", TORCH_BOX(&mask_pack));
  m.impl("mask_unpack", TORCH_BOX(&mask_unpack));
}

STABLE_TORCH_LIBRARY_IMPL(lors, CompositeExplicitAutograd, m) { m.impl("build_info", TORCH_BOX(&build_info)); }

}  // namespace lors::binding
