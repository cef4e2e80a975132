// SPDX-License-Identifier: Apache-2.0
// csrc/torch/cuda_ops.cpp on a machine without a GPU: its operators, registered as lors_on_cpu:: for CPU tensors, over a core
// of plain loops that insists on what the CUDA core is promised (stream, guard, dtypes, aligned scratch that comes back).
// Tests the binding: which pointer, size, dtype and flag goes where. The kernels themselves are tested by the simulator.

// torch's entry points that a CPU build of torch has not, or refuses, become functions of this file.
#define aoti_torch_empty_strided fake_empty_strided
#define aoti_torch_delete_tensor_object fake_delete_tensor_object
#define aoti_torch_create_device_guard fake_create_device_guard
#define aoti_torch_delete_device_guard fake_delete_device_guard
#define aoti_torch_get_current_device_index fake_get_current_device_index
#define aoti_torch_get_current_cuda_stream fake_get_current_cuda_stream
#define aoti_torch_cuda_mm_out fake_cuda_mm_out
#define aoti_torch_cuda_addmm_out fake_cuda_addmm_out
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Float8_e4m3fn.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>
#include <vector>
#undef aoti_torch_empty_strided
#undef aoti_torch_delete_tensor_object
extern "C" AOTITorchError aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t,
                                                   AtenTensorHandle*);
extern "C" AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle);
constexpr auto real_empty_strided = aoti_torch_empty_strided;
constexpr auto real_delete_tensor_object = aoti_torch_delete_tensor_object;
#define aoti_torch_empty_strided fake_empty_strided
#define aoti_torch_delete_tensor_object fake_delete_tensor_object

#define lors lors_on_cpu                     // namespace and library alike: the real operators stay what they are
#define CUDA CPU                             // the dispatch key
#define LORS_CUDA_EXPERT_SCRATCH_BYTES 4096  // two experts of a few
#include "../../../csrc/torch/cuda_ops.cpp"
#include "../../../csrc/torch/library.cpp"
#undef CUDA

namespace {

constexpr int kDevice = 3;  // what torch's current device is inside the guard
int guards = 0, scratch = 0, launches = 0;
int stream_object = 0;  // the stream is its address
std::set<AtenTensorHandle> scratch_tensors;

}  // namespace

cudaError_t cudaSetDevice(int) { return guards == 1 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "the device was set outside the guard"; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 4; break;
    case cudaDevAttrL2CacheSize: *value = 4096; break;  // panels of few rows
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    default: *value = 100 * 1024;  // little shared memory: 16-bit products of more than 64 tokens are then torch's
  }
  return cudaSuccess;
}

extern "C" {
AOTITorchError fake_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  ++guards;
  *guard = reinterpret_cast<DeviceGuardHandle>(&guards);
  return 0;
}
AOTITorchError fake_delete_device_guard(DeviceGuardHandle) {
  --guards;
  return 0;
}
AOTITorchError fake_get_current_device_index(int32_t* index) {
  *index = kDevice;
  return 0;
}
AOTITorchError fake_get_current_cuda_stream(int32_t, void** stream) {
  *stream = &stream_object;
  return 0;
}
AOTITorchError fake_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t type,
                                  int32_t index, AtenTensorHandle* tensor) {
  if (type != aoti_torch_device_type_cuda() || index != kDevice) return 1;
  ++scratch;
  const AOTITorchError error = real_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, tensor);
  scratch_tensors.insert(*tensor);
  return error;
}
AOTITorchError fake_delete_tensor_object(AtenTensorHandle tensor) {
  scratch -= static_cast<int>(scratch_tensors.erase(tensor));
  return real_delete_tensor_object(tensor);
}
AOTITorchError fake_cuda_mm_out(AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b) {
  ++launches;
  return aoti_torch_cpu_mm_out(out, a, b);
}
AOTITorchError fake_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle bias, AtenTensorHandle a, AtenTensorHandle b,
                                   double beta, double alpha) {
  int32_t types[3] = {};
  aoti_torch_get_dtype(out, &types[0]);
  aoti_torch_get_dtype(bias, &types[1]);
  aoti_torch_get_dtype(a, &types[2]);
  if (types[0] != types[1] || types[0] != types[2]) return 1;  // as cuBLAS would
  ++launches;
  return aoti_torch_cpu_addmm_out(out, bias, a, b, beta, alpha);
}
}

namespace lors {
namespace {

double load(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::float64: return static_cast<const double*>(data)[i];
    case DType::bfloat16: return static_cast<const torch::headeronly::BFloat16*>(data)[i];
    case DType::float16: return static_cast<const torch::headeronly::Half*>(data)[i];
    default: return static_cast<const float*>(data)[i];
  }
}

void store(void* data, DType dtype, int64_t i, double value) {
  const float f = static_cast<float>(value);
  switch (dtype) {
    case DType::float64: static_cast<double*>(data)[i] = value; break;
    case DType::bfloat16: static_cast<torch::headeronly::BFloat16*>(data)[i] = f; break;
    case DType::float16: static_cast<torch::headeronly::Half*>(data)[i] = f; break;
    default: static_cast<float*>(data)[i] = f;
  }
}

double rounded(DType dtype, double value) {
  double out[1];
  store(out, dtype, 0, value);
  return load(out, dtype, 0);
}

// What every call of the CUDA core is promised; each also takes scratch and gives it back.
Status promised(const CudaHost& host, std::initializer_list<DType> dtypes) {
  ++launches;
  if (guards != 1) return Status::error("the core was called outside the device guard.");
  if (host.stream != &stream_object) return Status::error("the core was given another stream than torch's current one.");
  for (const DType dtype : dtypes)
    if (dtype == DType::float64) return Status::error("the core was given float64.");
  const int before = scratch;
  void* handle = nullptr;
  std::memset(host.allocate(1000, &handle), 0xff, 1000);
  if (scratch != before + 1) return Status::error("scratch did not come from torch.");
  host.release(handle);
  return scratch == before ? Status() : Status::error("scratch did not go back to torch.");
}

}  // namespace
}  // namespace lors

#include "formats.h"

namespace lors {
namespace {

// The rows of an expert, [begin, end).
std::pair<int64_t, int64_t> rows_of(const Experts& experts, int64_t e, int64_t rows) {
  if (!experts.offsets) return {0, rows};
  return {e > 0 || !experts.first ? experts.offsets[e - 1] : 0, experts.offsets[e]};
}

int64_t gathered(const Experts& experts, int64_t row) { return experts.gather ? experts.gather[row] : row; }

template <typename Args>
double merged(Args a, int64_t n, int64_t k, int64_t expert = 0) {
  n += expert * a.out_features;
  const int64_t at = where(a, n, k);
  if (at < 0) return 0;
  a.lora_A = static_cast<const char*>(a.lora_A) + expert * a.r * a.in_features * dtype_size(a.lora_A_dtype);
  double sum = 0;
  for (int64_t j = 0; j < a.r; ++j)
    sum += load(a.lora_B, a.lora_B_dtype, n * a.r + j) * load(a.lora_A, a.lora_A_dtype, j * a.in_features + k);
  const Quantization& q = a.quantization;
  if (q.grid == Grid::none) return rounded(a.round_to, load(a.weight, a.weight_dtype, at) + a.scaling * sum);
  const int64_t group = (n * a.in_features + k) / q.group;
  const double scale = load(q.scales, q.scales_dtype, group), zero = q.zero_points ? q.zero_points[group] : 0;
  const float merged = static_cast<float>(static_cast<float>((code_at(a.weight, q.grid, at) - zero) * scale) + a.scaling * sum);
  return rounded(a.round_to, q.requantize_steps ? requantized(merged, q, n, k, scale, zero) : merged);
}

// dA, dB of G [N, K] (masked already).
template <typename Args>
void contract(const Args& a, int64_t N, const std::vector<double>& G, void* lora_A_grad, DType lora_A_dtype, bool transposed,
              void* lora_B_grad) {
  const int64_t K = a.in_features, r = a.r;
  for (int64_t j = 0; lora_A_grad && j < r; ++j)
    for (int64_t k = 0; k < K; ++k) {
      double sum = 0;
      for (int64_t n = 0; n < N; ++n) sum += G[n * K + k] * load(a.lora_B, a.lora_B_dtype, n * r + j);
      const int64_t at = transposed ? k * r + j : j * K + k;
      store(lora_A_grad, lora_A_dtype, at, a.scaling * sum + (transposed ? load(lora_A_grad, lora_A_dtype, at) : 0));
    }
  for (int64_t n = 0; lora_B_grad && n < N; ++n)
    for (int64_t j = 0; j < r; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += G[n * K + k] * load(a.lora_A, a.lora_A_dtype, j * K + k);
      store(lora_B_grad, a.lora_B_dtype, n * r + j, a.scaling * sum);
    }
}

}  // namespace

Status merge(const MergeArgs& a, const CudaHost& host) {
  if (a.round_to != a.merged_dtype) return Status::error("merge was asked for another round_to than merged_dtype.");
  if (Status s = promised(host, {a.weight_dtype, a.merged_dtype, a.lora_A_dtype, a.lora_B_dtype}); !s.ok()) return s;
  if (a.merged_layout == Layout::sparse24)
    std::memset(a.merged, 0, a.out_features * a.in_features / 2 * dtype_size(a.merged_dtype));
  for (int64_t n = 0; n < a.out_features; ++n)
    for (int64_t k = 0; k < a.in_features; ++k) {
      const int64_t at = a.merged_layout == Layout::sparse24 ? where(a, n, k) : n * a.in_features + k;
      if (at >= 0) store(a.merged, a.merged_dtype, at, merged(a, n, k));
    }
  return {};
}

Status fused_linear(const FusedLinearArgs& a, const CudaHost& host) {
  if (a.round_to != a.activation_dtype || a.output_dtype != a.activation_dtype)
    return Status::error("fused_linear was asked for another round_to or output_dtype than the activation's.");
  if (a.quantization.grid != Grid::none) return Status::error("fused_linear was given quantised codes.");
  if (Status s = promised(host, {a.weight_dtype, a.activation_dtype, a.lora_A_dtype, a.lora_B_dtype, a.bias_dtype}); !s.ok())
    return s;
  const int64_t N = a.out_features, K = a.in_features;
  const int64_t columns = a.input_gradient ? K : N, depth = a.input_gradient ? N : K;
  for (int64_t e = 0; e < a.experts.count; ++e) {
    const auto [begin, end] = rows_of(a.experts, e, a.tokens);
    if (begin == end) continue;
    std::vector<double> W(N * K);
    for (int64_t n = 0; n < N; ++n)
      for (int64_t k = 0; k < K; ++k) W[n * K + k] = merged(a, n, k, e);
    for (int64_t t = begin; t < end; ++t)
      for (int64_t c = 0; c < columns; ++c) {
        double sum = a.bias ? load(a.bias, a.bias_dtype, e * N + c) : 0;
        for (int64_t d = 0; d < depth; ++d)
          sum += load(a.activation, a.activation_dtype, gathered(a.experts, t) * depth + d) *
                 W[a.input_gradient ? d * K + c : c * K + d];
        store(a.output, a.output_dtype, t * columns + c, sum);
      }
  }
  if (a.experts.offsets && a.experts.last)
    for (int64_t i = a.experts.offsets[a.experts.count - 1] * columns; i < a.tokens * columns; ++i)
      store(a.output, a.output_dtype, i, 0);
  return {};
}

namespace {

// G = dY^T X of an expert.
std::vector<double> weight_gradient(const AdapterGradArgs& a, int64_t e) {
  const int64_t N = a.out_features, K = a.in_features;
  const auto [begin, end] = rows_of(a.experts, e, a.tokens);
  std::vector<double> G(N * K, 0.0);
  for (int64_t n = 0; n < N; ++n)
    for (int64_t k = 0; k < K; ++k)
      for (int64_t t = begin; t < end; ++t)
        G[n * K + k] +=
            load(a.grad_output, a.grad_output_dtype, t * N + n) * load(a.input, a.input_dtype, gathered(a.experts, t) * K + k);
  return G;
}

}  // namespace

Status adapter_grad_lors(const AdapterGradArgs& a, const CudaHost& host) {
  if (a.grad_output_dtype != a.input_dtype) return Status::error("the adapter gradients were given dY and X of two dtypes.");
  if (Status s = promised(host, {a.grad_output_dtype, a.input_dtype, a.lora_A_dtype, a.lora_B_dtype}); !s.ok()) return s;
  for (int64_t e = 0; e < a.experts.count; ++e) {
    const auto skip = [&](auto* p, int64_t rows, int64_t columns, DType dtype) {
      using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(p)>>, const char, char>;
      return p ? static_cast<decltype(p)>(static_cast<Byte*>(p) + e * rows * columns * dtype_size(dtype)) : p;
    };
    AdapterGradArgs one = a;
    one.lora_A = skip(a.lora_A, a.r, a.in_features, a.lora_A_dtype);
    one.lora_B = skip(a.lora_B, a.out_features, a.r, a.lora_B_dtype);
    void* const lora_A_grad = skip(a.lora_A_grad, a.r, a.in_features, a.lora_A_dtype);
    void* const lora_B_grad = skip(a.lora_B_grad, a.out_features, a.r, a.lora_B_dtype);
    contract(one, a.out_features, weight_gradient(a, e), lora_A_grad, a.lora_A_dtype, false, lora_B_grad);
  }
  return {};
}

Status masked_contract(const MaskedContractArgs& a, const CudaHost& host) {
  if (Status s = promised(host, {a.grad_weight_dtype, a.weight_dtype, a.lora_A_dtype, a.lora_B_dtype}); !s.ok()) return s;
  const int64_t K = a.in_features;
  std::vector<double> G(a.rows * K);
  for (int64_t n = 0; n < a.rows; ++n)
    for (int64_t k = 0; k < K; ++k)
      G[n * K + k] = kept(a.weight, a.weight_dtype, a.mask, n, k, K) ? load(a.grad_weight, a.grad_weight_dtype, n * K + k) : 0;
  contract(a, a.rows, G, a.lora_A_sum, DType::float32, true, a.lora_B_grad);
  return {};
}

Status cuda_device_supported(int index) { return index == 0 ? Status() : Status::error("Device 1 is of another kind."); }

namespace {
// Guards and scratch still held (none, between calls) and calls of the core or of a product so far.
std::string fake_state() { return std::to_string(guards) + " " + std::to_string(scratch) + " " + std::to_string(launches); }
}  // namespace

namespace binding {

// aten::mm.dtype_out, which torch has on a GPU alone: 16-bit factors, a float32 result.
Tensor fake_mm_dtype_out(const Tensor& a, const Tensor& b, ScalarType dtype, Tensor out) {
  check(a.scalar_type() == b.scalar_type() && a.scalar_type() != ScalarType::Float && dtype == ScalarType::Float &&
            out.scalar_type() == dtype,
        "mm.dtype_out was given other types than torch takes.");
  const Tensor x = torch::stable::to(a, dtype), y = torch::stable::to(b, dtype);
  TORCH_ERROR_CODE_CHECK(fake_cuda_mm_out(out.get(), x.get(), y.get()));
  return out;
}

}  // namespace binding

STABLE_TORCH_LIBRARY_IMPL(aten, CPU, m) { m.impl("mm.dtype_out", TORCH_BOX(&binding::fake_mm_dtype_out)); }
STABLE_TORCH_LIBRARY_FRAGMENT(lors, m) { m.def("fake_state() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(lors, CompositeExplicitAutograd, m) { m.impl("fake_state", TORCH_BOX(&fake_state)); }

}  // namespace lors
