// SPDX-License-Identifier: Apache-2.0
// A product of a 2:4 weight on CUDA, on the sparse tensor cores or as a merge and a dense product (lors/product_choice.h), and
// the operators that Python looks at this through: they belong to a device, not to tensors.
#pragma once

#include <cuda_runtime_api.h>
#include <lors/product_choice.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "adapted_weight.h"

namespace lors::binding {

inline void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears it: the next launch must not find it
  check(false, "lors_cuda could not ask CUDA for its device: ", cudaGetErrorString(error), ".");
}

// The sparse way of one product: the merged values go straight to where cuSPARSELt keeps them, followed by its metadata of this
// weight; or, without that, the dense merge is compressed by the library. The library's failures are returned, torch's thrown.
template <typename Backend>
Status sparse_product(const AdaptedWeight<Backend>& adapted, SparseProducts& products, const ProductKey& key, Tensor& out,
                      const Tensor& activation, const std::optional<Tensor>& bias) {
  const SparseProductProblem& problem = key.problem;
  const CudaHost& host = adapted.backend.host();
  const ScalarType dtype = activation.scalar_type();
  const Tensor tokens = row_major(activation);
  SparseProductSizes sizes;
  if (Status s = products.sizes(problem.out_features, problem.in_features, problem.dtype, sizes); !s.ok()) return s;
  Tensor compressed = empty(activation, {sizes.compressed}, ScalarType::Byte);
  auto* bytes = static_cast<char*>(compressed.mutable_data_ptr());
  if (key.in_place) {
    const Tensor& metadata = *adapted.sparse.library_metadata;
    if (metadata.numel() != sizes.compressed - sizes.values)
      return Status::error("lors::linear: library_metadata has " + std::to_string(metadata.numel()) + " bytes; cuSPARSELt " +
                           products.version() + " makes " + std::to_string(sizes.compressed - sizes.values) +
                           " for this weight. Make it again: SparseWeight.to(device) does.");
    adapted.merge_values(bytes);
    check_cuda(cudaMemcpyAsync(bytes + sizes.values, metadata.const_data_ptr(), metadata.numel(), cudaMemcpyDeviceToDevice,
                               static_cast<cudaStream_t>(host.stream)));
  } else {
    const Tensor merged = adapted.merged(dtype, dtype);
    SparseProductCompressArgs args{problem.out_features, problem.in_features, problem.dtype, problem.input_gradient};
    args.merged = merged.const_data_ptr();
    args.compressed = bytes;
    if (Status s = products.compress(args, host); !s.ok()) return s;
  }
  SparseProductArgs args{problem, bytes, tokens.const_data_ptr(), out.mutable_data_ptr(), bias.has_value()};
  SparseProducts::Plan plan;
  if (Status s = products.prepare(args, host, plan); !s.ok()) return s;
  if (bias) torch::stable::copy_(out, to(*bias, dtype));  // after prepare, which may overwrite it; one bias per row of output
  return products.run(args, plan, host);
}

// out [T, N or K] of a 2:4 weight, in the way that is chosen.
template <typename Backend>
void multiply_sparse24(const AdaptedWeight<Backend>& adapted, Tensor& out, const Tensor& activation,
                       const std::optional<Tensor>& bias, bool input_gradient) {
  const SparseProductOptions& options = adapted.sparse;
  // Where there is no question, the library is not even opened.
  if (options.products == "dense" || (input_gradient && !options.transposable))
    return adapted.multiply_merged(out, activation, bias, input_gradient, std::nullopt);
  ProductChoices* choices = nullptr;
  check_status(ProductChoices::of_current_device(choices));
  ProductRequest request;
  request.key.problem = {adapted.out_features(), adapted.in_features(), activation.size(0), dtype_of(activation),
                         input_gradient};
  request.key.in_place =
      options.library_metadata && !input_gradient && adapted.weight.scalar_type() == activation.scalar_type();
  request.key.bias = bias.has_value();
  request.products = options.products;
  // What is not row-major is copied, to memory that is aligned.
  request.activation = activation.is_contiguous() ? activation.const_data_ptr() : nullptr;
  request.output = out.const_data_ptr();
  const ProductWays ways{[&] {
                           adapted.multiply_merged(out, activation, bias, input_gradient, std::nullopt);
                           return Status();
                         },
                         [&] { return sparse_product(adapted, choices->sparse(), request.key, out, activation, bias); }};
  check_status(choices->take(request, ways, adapted.backend.host()));
}

// ---- by device ----------------------------------------------------------------------------------------------------------

inline const char* name_of(DType dtype) { return dtype == DType::bfloat16 ? "bfloat16" : "float16"; }

inline DType dtype_named(const std::string& name) {
  check(name == "bfloat16" || name == "float16", "dtype is '", name, "'; it must be bfloat16 or float16.");
  return name == "bfloat16" ? DType::bfloat16 : DType::float16;
}

inline std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return out + "\"";
}

// Both the device of torch and that of the runtime linked here, for as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(int64_t index) : guard_(static_cast<int32_t>(index)) {
    check_cuda(cudaSetDevice(static_cast<int>(index)));
    check_status(ProductChoices::of_current_device(choices_));
  }
  ProductChoices& choices() const { return *choices_; }
  SparseProducts& sparse() const { return choices_->sparse(); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  ProductChoices* choices_ = nullptr;
};

// Why no sparse product is taken on this device; empty if some may be.
inline std::string sparse_product_problem(int64_t index) { return OnDevice(index).sparse().serves().message(); }

// JSON: the plans of this device, the choices, and what the library is.
inline std::string sparse_product_info(int64_t index) {
  const OnDevice device(index);
  const SparseProductPlans plans = device.sparse().plans();
  std::ostringstream out;
  const auto problem = [&](const SparseProductProblem& p) {
    out << "\"out_features\": " << p.out_features << ", \"in_features\": " << p.in_features << ", \"tokens\": " << p.tokens
        << ", \"dtype\": \"" << name_of(p.dtype) << "\", \"operation\": \"" << (p.input_gradient ? "input_gradient" : "forward")
        << "\"";
  };
  out.precision(17);
  out << "{\"version\": " << quoted(device.sparse().version()) << ", \"hits\": " << plans.hits
      << ", \"misses\": " << plans.misses << ", \"searches\": " << plans.searches << ", \"maximum\": " << plans.maximum
      << ", \"plans\": [";
  const char* comma = "";
  for (const SparseProductPlans::Plan& plan : plans.plans) {
    out << comma << "{";
    problem(plan.problem);
    out << ", \"workspace\": " << plan.workspace << ", \"captured\": " << (plan.captured ? "true" : "false") << "}";
    comma = ", ";
  }
  out << "], \"choices\": [";
  comma = "";
  for (const auto& [key, choice] : device.choices().all()) {
    SparseProductAlgorithm algorithm;
    const bool known = device.sparse().algorithm(key.problem, algorithm);
    out << comma << "{";
    problem(key.problem);
    out << ", \"in_place\": " << (key.in_place ? "true" : "false") << ", \"bias\": " << (key.bias ? "true" : "false")
        << ", \"products\": \"" << (choice.sparse ? "sparse" : "dense") << "\", \"dense_us\": " << choice.dense_us
        << ", \"sparse_us\": " << choice.sparse_us << ", \"note\": " << quoted(choice.note) << ", \"algorithm\": ";
    if (known)
      out << "[" << algorithm.config << ", " << algorithm.split_k << ", " << algorithm.split_k_mode << "]}";
    else
      out << "null}";
    comma = ", ";
  }
  out << "]}";
  return out.str();
}

// Forgets plans, choices and counts; what a CUDA graph holds stays.
inline void sparse_product_clear(int64_t index) {
  const OnDevice device(index);
  device.choices().clear();
  device.sparse().clear();
}

// A choice as sparse_product_info tells it; config -1: no algorithm is known.
inline void sparse_product_set(int64_t index, int64_t out_features, int64_t in_features, int64_t tokens,
                               const std::string& dtype, const std::string& operation, bool in_place, bool bias,
                               const std::string& products, double dense_us, double sparse_us, const std::string& note,
                               int64_t config, int64_t split_k, int64_t split_k_mode) {
  check(operation == "forward" || operation == "input_gradient", "operation is '", operation,
        "'; it must be forward or input_gradient.");
  check(products == "dense" || products == "sparse", "products is '", products, "'; it must be dense or sparse.");
  ProductKey key{{out_features, in_features, tokens, dtype_named(dtype), operation == "input_gradient"}, in_place, bias};
  const OnDevice device(index);
  check_status(device.sparse().serves(key.problem));
  if (config >= 0)
    device.sparse().know(key.problem, {static_cast<int>(config), static_cast<int>(split_k), static_cast<int>(split_k_mode)});
  device.choices().set(key, {products == "sparse", dense_us, sparse_us, note});
}

// What cuSPARSELt makes of a 2:4 weight [N, K] (`transposed`: 2:4 along N), as bytes.
template <typename Backend>
Tensor sparse_product_compress(const Tensor& merged, bool transposed) {
  check(merged.dim() == 2 && merged.numel() > 0, "lors::sparse_product_compress: merged has shape ", shape(merged),
        "; it must be [out_features, in_features], both at least 1.");
  check_floating("sparse_product_compress", "merged", merged);
  const Backend backend(merged);
  const Tensor dense = row_major(merged);
  ProductChoices* choices = nullptr;
  check_status(ProductChoices::of_current_device(choices));
  SparseProductSizes sizes;
  check_status(choices->sparse().sizes(merged.size(0), merged.size(1), dtype_of(merged), sizes));
  Tensor compressed = empty(merged, {sizes.compressed}, ScalarType::Byte);
  SparseProductCompressArgs args{merged.size(0), merged.size(1), dtype_of(merged), transposed};
  args.merged = dense.const_data_ptr();
  args.compressed = compressed.mutable_data_ptr();
  check_status(choices->sparse().compress(args, backend.host()));
  return compressed;
}

}  // namespace lors::binding
