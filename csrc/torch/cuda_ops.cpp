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

#include "cuda/masked_contract_config.h"
#include "cuda/paths.h"
#include "operators.h"

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

class Cuda {
 public:
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

 private:
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

STABLE_TORCH_LIBRARY_IMPL(lors, CUDA, m) { Operators<Cuda>::implement(m); }

STABLE_TORCH_LIBRARY_FRAGMENT(lors, m) {
  m.def("cuda_device_problem(int index) -> str");  // why this build cannot use the device; empty: it can
}

STABLE_TORCH_LIBRARY_IMPL(lors, CompositeExplicitAutograd, m) {
  m.impl("cuda_device_problem", TORCH_BOX(&cuda_device_problem));
}

}  // namespace lors::binding
