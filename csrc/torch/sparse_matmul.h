// SPDX-License-Identifier: Apache-2.0
// Y [T, N] = X W~^T + b of a 2:4 weight on the sparse tensor cores: W~ [N, K] is merged dense, compressed by torch's own
// aten::_cslt_compress and multiplied by aten::_cslt_sparse_mm (cuSPARSELt). Taken by lors::linear on CUDA where the
// environment variable LORS_SPARSE_PRODUCT asks for it (docs/sparse-products.md); the input gradient is always dense.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>

#include "adapted_weight.h"
#include "torch_errors.h"

namespace lors::binding {

// The value of LORS_SPARSE_PRODUCT, "dense" when unset. Read at every call, so that one process can compare.
inline std::string sparse_product_setting() {
  const char* value = std::getenv("LORS_SPARSE_PRODUCT");
  const std::string setting = value && *value ? value : "dense";
  check(setting == "dense" || setting == "sparse" || setting == "auto", "LORS_SPARSE_PRODUCT is '", setting,
        "'; set it to dense, sparse or auto, or leave it unset.");
  return setting;
}

// cuSPARSELt's matmul of merged [N, K], at most two of four nonzero along K, with row-major tokens [T, K]; bias [N] or none.
inline Tensor torch_sparse_matmul(const Tensor& merged, const Tensor& tokens, const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 1> compress{from(merged)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_cslt_compress", "", compress.data(), TORCH_ABI_VERSION));
  // Its first result is W~ X^T [N, T]; transpose_result stores that as [T, N] row-major, and is so returned.
  const Tensor compressed = to<Tensor>(compress[0]);
  std::array<StableIValue, 9> matmul{from(compressed),
                                     from(torch::stable::transpose(tokens, 0, 1)),
                                     from(bias),
                                     from(std::nullopt),               // alpha
                                     from(std::nullopt),               // out_dtype
                                     from(true),                       // transpose_result
                                     from(static_cast<int64_t>(0)),    // alg_id
                                     from(static_cast<int64_t>(1)),    // split_k
                                     from(static_cast<int64_t>(-1))};  // split_k_mode
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_cslt_sparse_mm", "", matmul.data(), TORCH_ABI_VERSION));
  return to<Tensor>(matmul[0]);
}

// The forward of lors::linear, or nothing where the dense matmul is to be taken. `merged`: the merged weight, where it is kept.
template <typename Backend>
std::optional<Tensor> sparse_matmul(const AdaptedWeight<Backend>& adapted, const Tensor& input,
                                    const std::optional<Tensor>& bias, const std::optional<Tensor>& merged) {
  const ScalarType dtype = input.scalar_type();
  // In float32 cuSPARSELt would multiply in TF32, and keep one of two weights instead of two of four.
  if (adapted.layout != Layout::sparse24 || (dtype != ScalarType::BFloat16 && dtype != ScalarType::Half)) return std::nullopt;
  const std::string setting = sparse_product_setting();
  if (setting == "dense") return std::nullopt;
  const int64_t T = input.size(0);
  if (setting == "auto" && !adapted.backend.prefers_sparse_matmul(input, adapted)) return std::nullopt;
  std::optional<Tensor> addend;
  if (bias) addend = row_major(*bias, dtype);
  const Tensor operand = merged ? *merged : adapted.merged(dtype, dtype);
  try {
    return torch_sparse_matmul(operand, row_major(input), addend);
  } catch (const std::runtime_error&) {
    const std::string reason = torch_reason();
    std::ostringstream text;
    text << "lors::linear: LORS_SPARSE_PRODUCT is '" << setting << "', and torch's sparse matmul of " << T
         << " tokens with a 2:4 weight of shape " << shape(operand)
         << " failed: " << (reason.empty() ? "its reason is on stderr." : reason)
         << " Set LORS_SPARSE_PRODUCT=dense for the dense matmul.";
    throw std::runtime_error(text.str());
  }
}

}  // namespace lors::binding
