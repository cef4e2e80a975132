// SPDX-License-Identifier: Apache-2.0
// The operators on CUDA (operators.h), a library of its own (_ops_cuda.so) loaded only with a CUDA torch of the same CUDA major
// version. Everything is queued on torch's current stream with memory of torch's allocator, and nothing synchronises, so that
// CUDA graphs can capture it. Matmuls are called below the dispatcher, as on the CPU.
#include <cuda_runtime_api.h>
#include <lors/cuda_device.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <cstdlib>
#include <limits>

#include "cuda/fused_linear_config.h"
#include "cuda/fused_linear_fast_config.h"
#include "cuda/masked_contract_config.h"
#include "cuda/paths.h"
#include "grouped_operators.h"
#include "operators.h"

// Of experts that are merged before they are multiplied, at a time; smaller for tests.
#ifndef LORS_CUDA_EXPERT_SCRATCH_BYTES
#define LORS_CUDA_EXPERT_SCRATCH_BYTES (int64_t{256} << 20)
#endif

namespace lors::binding {
namespace {

void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears it, so that the next launch does not report it
  check(false, "lors_cuda could not ask CUDA for its device: ", cudaGetErrorString(error), ".");
}

// Tensors of bytes on the current device. Releasing one as soon as the work is queued is safe: torch's allocator reuses memory
// only for later work of the stream it was allocated on, and a call uses one stream.
void* allocate_from_torch(int64_t bytes, void** handle) {
  const int64_t stride = 1;
  AtenTensorHandle tensor = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &bytes, &stride, aoti_torch_dtype_uint8(), aoti_torch_device_type_cuda(),
                                                  torch::stable::accelerator::getCurrentDeviceIndex(), &tensor));
  void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &data));
  *handle = tensor;
  return data;
}

void release_to_torch(void* handle) { aoti_torch_delete_tensor_object(static_cast<AtenTensorHandle>(handle)); }

void* current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

// The setting LORS_CUDA_FUSED: whether matmuls use fused_linear always, never, or by record (nullopt).
std::optional<bool> forced_fused_linear() {
  const char* value = std::getenv("LORS_CUDA_FUSED");
  const std::string wanted = value ? value : "";
  check(wanted.empty() || wanted == "always" || wanted == "never", "LORS_CUDA_FUSED is '", wanted,
        "'; set it to always or never, or leave it unset.");
  return wanted.empty() ? std::nullopt : std::optional(wanted == "always");
}

// Nothing is checked: looking at the numbers would wait for the device.
struct CudaGroups {
  CudaGroups(const char*, const Tensor& given_offsets, std::optional<Tensor> given_rows, int64_t, int64_t)
      : offsets(given_offsets), rows(std::move(given_rows)) {}

  CudaGroups by_row() const {
    CudaGroups same(*this);
    same.rows = std::nullopt;
    return same;
  }

  // Experts [begin, begin + count).
  Experts experts(int64_t begin, int64_t count) const {
    Experts some;
    some.count = count;
    some.offsets = static_cast<const int32_t*>(offsets.const_data_ptr()) + begin;
    if (rows) some.gather = static_cast<const int32_t*>(rows->const_data_ptr());
    some.first = begin == 0;
    some.last = begin + count == offsets.size(0);
    return some;
  }

  Tensor offsets;
  std::optional<Tensor> rows;
};

class Cuda {
 public:
  using Groups = CudaGroups;

  explicit Cuda(const Tensor& tensor)
      : device_(tensor.get_device_index()),
        guard_(device_),
        host_{current_stream(device_), allocate_from_torch, release_to_torch} {
    // This library links its own static cudart, whose current device guard_ (torch's) does not set.
    check_cuda(cudaSetDevice(device_));
  }

  const CudaHost& host() const { return host_; }
  static constexpr auto allocate = allocate_from_torch;
  static constexpr auto release = release_to_torch;

  static ScalarType matmul_dtype(ScalarType activation) { return activation; }

  static int64_t merged_rows(int64_t, ScalarType) { return std::numeric_limits<int64_t>::max(); }

  static void matmul(Tensor& out, const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias) {
    if (bias) {
      TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(out.get(), bias->get(), a.get(), b.get(), 1.0, 1.0));
    } else {
      TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()));
    }
  }

  // fused_linear reads dense weights only here, and needs an adapter.
  bool prefers_fused_linear(const Tensor& activation, const AdaptedWeight<Cuda>& adapted, bool input_gradient, bool) const {
    if (adapted.layout != Layout::dense || adapted.r() == 0 || adapted.is_quantized()) return false;
    if (const std::optional<bool> forced = forced_fused_linear()) return *forced;
    return recorded_path(activation, adapted, input_gradient) == cuda::Path::fused_linear;
  }

  bool prefers_sparse_matmul(const Tensor& activation, const AdaptedWeight<Cuda>& adapted) const {
    return recorded_path(activation, adapted, false) == cuda::Path::sparse_matmul;
  }

  static ScalarType fused_output_dtype(ScalarType activation) { return activation; }
  static ScalarType fused_bias_dtype(const Tensor& bias) { return bias.scalar_type(); }

  static constexpr bool kSparseMatmul = true;
  static constexpr bool kMixedActivations = false;

  // The tensors are what lors_cuda/formats.py has checked: looking at them would wait for the device.
  static void check_offsets(const char*, int64_t, const Tensor&, const Tensor&, int64_t, int64_t, int64_t, int64_t) {}

  static bool exact_at_once(const Tensor&, const Tensor&, const AdaptedWeight<Cuda>&, const uint32_t*, Tensor*, Tensor*) {
    return false;
  }

  static ScalarType gradient_dtype(ScalarType activation, ScalarType) { return activation; }

  // Products of 16-bit values are added up and left in float32, whatever torch's setting for reduced precision: only partial
  // sums in 16 bits would be concerned by it, and there are none. float32 follows torch's setting for TF32, as Y and dX do.
  // Through the dispatcher, as torch 2.10 has no entry below it; autocast leaves operators with an out argument alone.
  static void gradient_matmul(Tensor& out, const Tensor& a, const Tensor& b) {
    using torch::stable::detail::from;
    if (a.scalar_type() == out.scalar_type()) return matmul(out, a, b, std::nullopt);
    std::array<StableIValue, 4> arguments{from(a), from(b), from(out.scalar_type()), from(out)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype_out", arguments.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(arguments[0]);  // the result is `out` once more, and has to be taken
  }

  int64_t gradient_panel_rows(int64_t N, int64_t K, ScalarType) const {
    int l2_bytes = 0;
    check_cuda(cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, device_));
    return cuda::gradient_panel_rows(N, K, l2_bytes);
  }

  // torch's sum, which has no entry point below the dispatcher: the explicit dtype makes autocast leave it alone, and autograd
  // is off inside an operator. Summed in float32, rounded once, bit-reproducible.
  void bias_grad(const Tensor& grad_output, Tensor& grad_bias) const {
    const std::vector<int64_t> tokens{0};
    torch::stable::copy_(grad_bias, torch::stable::sum(grad_output, tokens, false, ScalarType::Float));
  }

  // fused_linear, whose blocks find their experts on the device. What it does not read is merged first, a few experts at a
  // time and also those without rows, which only the device knows, and fused_linear multiplies that.
  void grouped_multiply(Tensor& out, const Tensor& activation, const Groups& groups, const AdaptedWeight<Cuda>& adapted,
                        const std::optional<Tensor>& bias, bool input_gradient, const std::optional<Tensor>& merged) const {
    const int64_t E = adapted.experts, N = adapted.N / E, K = adapted.K;
    const ScalarType dtype = activation.scalar_type();
    check(dtype != ScalarType::Double, "lors::", adapted.op, ": CUDA multiplies experts in float32, bfloat16 and float16, and",
          " was given float64; convert the tensors or move them to the CPU.");
    const std::optional<Tensor> addend = row_major(bias);
    const auto multiply = [&](const AdaptedWeight<Cuda>& stack, int64_t begin, int64_t count) {
      const FusedLinearArgs args = describe_groups(out, activation, groups, stack, addend, input_gradient, begin, count);
      check_status(fused_linear(args, host_));
    };
    if (merged) return multiply({adapted, *merged}, 0, E);
    if (multiplies_groups(describe_groups(out, activation, groups, adapted, addend, input_gradient, 0, E)))
      return multiply(adapted, 0, E);
    const int64_t most = std::clamp<int64_t>(LORS_CUDA_EXPERT_SCRATCH_BYTES / (N * K * element_bytes(dtype)), 1, E);
    Scratch<Cuda> scratch(adapted.weight, most * N, K, dtype);
    for (int64_t begin = 0; begin < E; begin += most) {
      const int64_t count = std::min(most, E - begin);
      for (int64_t e = 0; e < count; ++e) {
        Tensor one = slice(scratch.tensor, 0, e * N, N);
        adapted.expert(begin + e).merge(one, dtype);
      }
      multiply({adapted, scratch.tensor}, begin, count);
    }
  }

  void grouped_adapter_gradients(const Tensor& grad_output, const Tensor& input, const Groups& groups,
                                 const AdaptedWeight<Cuda>& adapted, bool exact, Tensor* grad_lora_A,
                                 Tensor* grad_lora_B) const {
    check(!exact, "lors::", adapted.op, ": gradient is 'exact', for which CUDA would have to know how many rows each expert",
          " has; use gradient='lors', or the CPU.");
    std::optional<ScalarType> dtype;  // float32 holds every value of both
    if (grad_output.scalar_type() != input.scalar_type()) dtype = ScalarType::Float;
    const Tensor dY = row_major(grad_output, dtype), X = row_major(input, dtype);
    AdapterGradArgs args;
    adapted.describe_gradients(args, dY, X, grad_lora_A, grad_lora_B);
    args.tokens = dY.size(0);
    args.out_features = adapted.N / adapted.experts;
    args.experts = groups.experts(0, adapted.experts);
    check_status(adapter_grad_lors(args, host_));
  }

  // As the gradient of lora_B [E, N, 1] of an input and a lora_A of ones.
  void grouped_bias_gradient(const Tensor& grad_output, const Groups& groups, Tensor& grad_bias) const {
    const int64_t S = grad_output.size(0), E = grad_bias.size(0);
    const Tensor input = ones(grad_output, S, grad_output.scalar_type()), lora_A = ones(grad_output, E, ScalarType::Float);
    AdapterGradArgs args;
    args.tokens = S;
    args.out_features = grad_bias.size(1);
    args.in_features = args.r = 1;
    args.experts = groups.by_row().experts(0, E);
    args.grad_output = grad_output.const_data_ptr();
    args.input = input.const_data_ptr();
    args.grad_output_dtype = args.input_dtype = dtype_of(grad_output);
    args.lora_A = lora_A.const_data_ptr();
    args.lora_B_grad = grad_bias.mutable_data_ptr();
    args.lora_B_dtype = dtype_of(grad_bias);
    check_status(adapter_grad_lors(args, host_));
  }

 private:
  static Tensor ones(const Tensor& like, int64_t rows, ScalarType dtype) {
    return torch::stable::fill_(empty(like, {rows, 1}, dtype), 1.0);
  }

  // `stack`: the experts [begin, begin + count) of all, and `out`, `bias`: of all.
  static FusedLinearArgs describe_groups(Tensor& out, const Tensor& activation, const Groups& groups,
                                         const AdaptedWeight<Cuda>& stack, const std::optional<Tensor>& bias,
                                         bool input_gradient, int64_t begin, int64_t count) {
    FusedLinearArgs args;
    stack.describe(args);
    args.experts = groups.experts(begin, count);
    args.tokens = out.size(0);
    args.out_features = stack.N / stack.experts;
    args.input_gradient = input_gradient;
    args.activation = activation.const_data_ptr();
    args.activation_dtype = args.round_to = args.output_dtype = dtype_of(activation);
    args.output = out.mutable_data_ptr();
    if (!bias) return args;
    args.bias = at(*bias, begin * bias->size(1));
    args.bias_dtype = dtype_of(*bias);
    return args;
  }

  // Whether fused_linear reads the stored weight; LORS_CUDA_FUSED=never says that it shall not.
  bool multiplies_groups(const FusedLinearArgs& args) const {
    if (args.quantization.grid != Grid::none || !forced_fused_linear().value_or(true)) return false;
    if (args.weight_layout == Layout::dense) return true;
    cuda::DeviceLimits limits;
    check_cuda(cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device_));
    check_cuda(cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_));
    const int terms_A = cuda::fused_terms(args.lora_A_dtype), terms_B = cuda::fused_terms(args.lora_B_dtype);
    return cuda::fused_fast_config(args, terms_A, terms_B, limits).columns != 0;
  }

  // 90 for compute capability 9.0.
  int architecture() const {
    int major = 0, minor = 0;
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_));
    check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_));
    return 10 * major + minor;
  }

  // Records are of weights that are not quantised.
  cuda::Path recorded_path(const Tensor& activation, const AdaptedWeight<Cuda>& adapted, bool input_gradient) const {
    if (adapted.is_quantized()) return cuda::Path::merge_matmul;
    const cuda::PathShape shape{dtype_of(activation),   adapted.layout,        input_gradient,
                                adapted.out_features(), adapted.in_features(), activation.size(0)};
    return cuda::recorded_path(cuda::path_records(architecture()), shape);
  }

  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  CudaHost host_;
};

std::string cuda_device_problem(int64_t index) { return cuda_device_supported(static_cast<int>(index)).message(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lors, CUDA, m) {
  Operators<Cuda>::implement(m);
  GroupedOperators<Cuda>::implement(m);
}

STABLE_TORCH_LIBRARY_FRAGMENT(lors, m) {
  m.def("cuda_device_problem(int index) -> str");  // why this build cannot use the device; empty: it can
}

STABLE_TORCH_LIBRARY_IMPL(lors, CompositeExplicitAutograd, m) {
  m.impl("cuda_device_problem", TORCH_BOX(&cuda_device_problem));
}

}  // namespace lors::binding
