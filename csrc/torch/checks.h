// SPDX-License-Identifier: Apache-2.0
// The checks at the ops' edge: everything below them trusts. Each failure is a sentence: what was given, what is needed.
#pragma once

#include <lors/types.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace lors::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws what Python sees as a RuntimeError with exactly this text (STD_TORCH_CHECK would prepend a source file).
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape(const Tensor& t) {
  std::ostringstream out;
  out << "[";
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
  out << "]";
  return out.str();
}

inline bool is_floating(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return DType::float64;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default: return DType::float32;
  }
}

inline void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& weight) {
  check(t.device() == weight.device(), "lors::", op, ": ", name,
        " is on another device than weight; move all tensors of one call to the same device.");
}

// A tensor whose storage was freed under it (untyped_storage().resize_(0), as sharded training does) has a null pointer.
inline void check_storage(const char* op, const char* name, const Tensor& t) {
  check(t.numel() == 0 || t.const_data_ptr() != nullptr, "lors::", op, ": ", name, " has shape ", shape(t),
        " but no memory behind it; its storage was freed.");
}

inline void check_floating(const char* op, const char* name, const Tensor& t) {
  check(is_floating(t), "lors::", op, ": ", name,
        " has a dtype that is not supported; it must be float64, float32, bfloat16 or float16.");
  check_storage(op, name, t);
}

// float64 is for checking gradients, on the CPU.
inline void check_served(const char* op, const char* name, const Tensor& t) {
  check(t.scalar_type() != ScalarType::Double || t.device().is_cpu(), "lors::", op, ": ", name,
        " is float64, which is computed on the CPU only; convert it to float32, bfloat16 or float16, or move all tensors of"
        " the call to the CPU.");
}

// weight [N, K], mask int32 [N, ceil(K/32)], lora_A [r, K], lora_B [N, r].
inline void check_adapted_weight(const char* op, const Tensor& weight, const std::optional<Tensor>& mask, const Tensor& lora_A,
                                 const Tensor& lora_B) {
  check(weight.dim() == 2, "lors::", op, ": weight has shape ", shape(weight), "; it must be [out_features, in_features].");
  const int64_t N = weight.size(0), K = weight.size(1);
  check(N > 0 && K > 0, "lors::", op, ": weight has shape ", shape(weight), "; both sides must be at least 1.");
  check(lora_A.dim() == 2 && lora_A.size(1) == K, "lors::", op, ": lora_A has shape ", shape(lora_A), "; it must be [r, ", K,
        "] for a weight of shape ", shape(weight), ".");
  const int64_t r = lora_A.size(0);
  check(r > 0, "lors::", op, ": lora_A has shape ", shape(lora_A), "; the rank r must be at least 1.");
  check(lora_B.dim() == 2 && lora_B.size(0) == N && lora_B.size(1) == r, "lors::", op, ": lora_B has shape ", shape(lora_B),
        "; it must be [", N, ", ", r, "] for a weight of shape ", shape(weight), " and lora_A of shape ", shape(lora_A), ".");
  check_floating(op, "weight", weight);
  check_floating(op, "lora_A", lora_A);
  check_floating(op, "lora_B", lora_B);
  check_same_device(op, "lora_A", lora_A, weight);
  check_same_device(op, "lora_B", lora_B, weight);
  check_served(op, "weight", weight);
  check_served(op, "lora_A", lora_A);
  check_served(op, "lora_B", lora_B);
  if (mask) {
    check(mask->scalar_type() == ScalarType::Int && mask->dim() == 2 && mask->size(0) == N && mask->size(1) == mask_words(K),
          "lors::", op, ": mask has shape ", shape(*mask), "; it must be int32 [", N, ", ", mask_words(K),
          "], the bits that lors::mask_pack makes of a bool mask of shape ", shape(weight), ".");
    check_same_device(op, "mask", *mask, weight);
    check_storage(op, "mask", *mask);
  }
}

// bias [N]
inline void check_bias(const char* op, const Tensor& bias, const Tensor& weight) {
  check(bias.dim() == 1 && bias.size(0) == weight.size(0), "lors::", op, ": bias has shape ", shape(bias), "; it must be [",
        weight.size(0), "] for a weight of shape ", shape(weight), ".");
  check_floating(op, "bias", bias);
  check_same_device(op, "bias", bias, weight);
  check_served(op, "bias", bias);
}

// A [T, features] activation or gradient that belongs to `weight`. float64 goes with float64 alone.
inline void check_tokens(const char* op, const char* name, const Tensor& t, const Tensor& weight, int64_t features) {
  check(t.dim() == 2 && t.size(1) == features, "lors::", op, ": ", name, " has shape ", shape(t), "; it must be [tokens, ",
        features, "] for a weight of shape ", shape(weight), ".");
  check_floating(op, name, t);
  check((t.scalar_type() == ScalarType::Double) == (weight.scalar_type() == ScalarType::Double), "lors::", op, ": ", name,
        " and weight must both be float64, or neither.");
  check_same_device(op, name, t, weight);
}

// Whether the gradient's name is "exact"; refuses names other than "lors" and "exact".
inline bool is_exact(const char* op, const std::string& gradient) {
  check(gradient == "lors" || gradient == "exact", "lors::", op, ": gradient is '", gradient,
        "'; it must be 'lors' or 'exact'.");
  return gradient == "exact";
}

}  // namespace lors::binding
