// SPDX-License-Identifier: Apache-2.0
// Argument checks of the operators, made once per call: the code below trusts them. An error says what was given and what is
// needed.
#pragma once

#include <lors/quantization.h>
#include <lors/random.h>
#include <lors/types.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>  // TORCH_ERROR_CODE_CHECK: the one name that every torch >= 2.10 has

#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace lors::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws a RuntimeError in Python with exactly this text; STD_TORCH_CHECK would prepend a source file.
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A shape in an error's text. It is written only where there is an error: every call makes a dozen of them.
struct Shape {
  const Tensor& tensor;
  friend std::ostream& operator<<(std::ostream& out, const Shape& shape) {
    out << "[";
    for (int64_t i = 0; i < shape.tensor.dim(); ++i) out << (i ? ", " : "") << shape.tensor.size(i);
    return out << "]";
  }
};

inline Shape shape(const Tensor& t) { return {t}; }

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

inline bool is_floating(const Tensor& t) { return is_floating(t.scalar_type()); }

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return DType::float64;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default: return DType::float32;
  }
}

inline int64_t element_bytes(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
    case ScalarType::Long: return 8;
    case ScalarType::Float:
    case ScalarType::Int: return 4;
    case ScalarType::Char:
    case ScalarType::Byte: return 1;
    default: return 2;
  }
}

inline void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& weight) {
  check(t.device() == weight.device(), "lors::", op, ": ", name,
        " is on another device than weight; move all tensors of one call to the same device.");
}

// A tensor whose storage was freed (untyped_storage().resize_(0), as sharded training does) has a null pointer.
inline void check_storage(const char* op, const char* name, const Tensor& t) {
  check(t.numel() == 0 || t.const_data_ptr() != nullptr, "lors::", op, ": ", name, " has shape ", shape(t),
        " but no memory behind it; its storage was freed.");
}

inline void check_floating(const char* op, const char* name, const Tensor& t) {
  check(is_floating(t), "lors::", op, ": ", name,
        " has a dtype that is not supported; it must be float64, float32, bfloat16 or float16.");
  check_storage(op, name, t);
}

// float64 exists for checking gradients, on the CPU.
inline void check_supported(const char* op, const char* name, const Tensor& t) {
  check(t.scalar_type() != ScalarType::Double || t.device().is_cpu(), "lors::", op, ": ", name,
        " is float64, which is computed on the CPU only; convert it to float32, bfloat16 or float16, or move all tensors of"
        " the call to the CPU.");
}

// What a quantised weight has beside its codes: the operators' last five arguments.
struct GridArguments {
  std::optional<Tensor> scales, zero_points;
  std::string grid;
  int64_t requantize_steps = 0, dither_seed = -1;
};

// The type of the codes and how many lie in an element of it.
struct GridKind {
  const char* name;
  Grid grid;
  ScalarType codes;
  const char* codes_name;
  int64_t codes_per_element;
};
inline constexpr std::array kGridKinds = {GridKind{"int8", Grid::int8, ScalarType::Char, "int8", 1},
                                          GridKind{"int4", Grid::int4, ScalarType::Byte, "uint8", 2},
                                          GridKind{"e4m3", Grid::e4m3, ScalarType::Byte, "uint8", 1}};

// A frozen weight as an operator's arguments give it. The layout follows from `index`: none: dense; uint8 metadata: 2:4
// (sparse24.h); int64 row offsets: bitmap (types.h).
struct StoredWeight {
  Tensor values;               // [N, K]; 2:4: [N, K/2]; bitmap: [row_offsets[N]]; or codes, of int4 half as many elements
  std::optional<Tensor> mask;  // int32 [N, ceil(K/32)]; bitmap: always
  std::optional<Tensor> index;
  GridArguments quantization;
  const GridKind* kind = nullptr;  // of codes; null: values
  Layout layout = Layout::dense;
  int64_t out_features = 0, in_features = 0;  // N, K
  int64_t experts = 0;                        // of a stack, whose out_features are those of all experts; 0: one matrix

  ScalarType dtype() const { return kind ? quantization.scales->scalar_type() : values.scalar_type(); }
  int64_t rows_of_one() const { return experts > 0 ? out_features / experts : out_features; }
  int64_t codes_per_element() const { return kind ? kind->codes_per_element : 1; }

  struct Shape {
    const StoredWeight& weight;
    friend std::ostream& operator<<(std::ostream& out, const Shape& shape) {
      return out << "[" << shape.weight.out_features << ", " << shape.weight.in_features << "]";
    }
  };
  Shape shape() const { return {*this}; }
};

inline void check_bits(const char* op, const char* name, const Tensor& bits, int64_t N, int64_t K) {
  check(bits.scalar_type() == ScalarType::Int && bits.dim() == 2 && bits.size(0) == N && bits.size(1) == mask_words(K),
        "lors::", op, ": ", name, " has shape ", shape(bits), "; it must be int32 [", N, ", ", mask_words(K),
        "], the packed bits of a bool mask of shape [", N, ", ", K, "].");
  check_storage(op, name, bits);
}

// The values of a weight, or its codes.
inline void check_values(const char* op, const char* name, const Tensor& values, const GridKind* kind) {
  if (!kind) return check_floating(op, name, values);
  check(values.scalar_type() == kind->codes, "lors::", op, ": ", name, " has a dtype that grid '", kind->name,
        "' does not go with; its codes must be ", kind->codes_name, ".");
  check_storage(op, name, values);
}

// scales [N, K / group], zero_points alike: shapes and dtypes only, as the other contents.
inline void check_grid(const char* op, const StoredWeight& weight) {
  const GridArguments& quantization = weight.quantization;
  const Tensor& scales = *quantization.scales;
  const int64_t K = weight.in_features, groups = scales.dim() == 2 ? scales.size(1) : 0, group = groups ? K / groups : 0;
  check(is_floating(scales) && scales.scalar_type() != ScalarType::Double && groups > 0 &&
            scales.size(0) == weight.out_features && group * groups == K &&
            (group == K || group == 32 || group == 64 || group == 128),
        "lors::", op, ": scales has shape ", shape(scales), "; it must be float32, bfloat16 or float16 [", weight.out_features,
        ", ", K, " / group] for groups of 32, 64, 128 or all ", K, " columns.");
  check_storage(op, "scales", scales);
  check_same_device(op, "scales", scales, weight.values);
  if (quantization.zero_points) {
    const Tensor& zeros = *quantization.zero_points;
    check(weight.kind->grid != Grid::e4m3, "lors::", op, ": zero_points was given for grid 'e4m3', which has none.");
    check(zeros.scalar_type() == ScalarType::Char && zeros.dim() == 2 && zeros.size(0) == scales.size(0) &&
              zeros.size(1) == groups,
          "lors::", op, ": zero_points has shape ", shape(zeros), "; it must be int8 ", shape(scales), ", as scales.");
    check_storage(op, "zero_points", zeros);
    check_same_device(op, "zero_points", zeros, weight.values);
  }
  check(weight.mask || weight.index, "lors::", op, ": a quantised dense weight was given without a mask; its codes do not tell",
        " what is kept.");
  const int64_t steps = quantization.requantize_steps;
  check(steps == 0 || steps == 1 || (steps == 16 && weight.kind->grid == Grid::int8), "lors::", op, ": requantize_steps is ",
        steps, "; it must be 0, 1, or 16 for grid 'int8'.");
  check(weight.kind->grid != Grid::e4m3 || quantization.dither_seed < 0, "lors::", op,
        ": dither_seed was given for grid 'e4m3', which has no dither.");
}

// values [N, K/2], metadata uint8 [N, ceil(K/8)]: shapes only. Contents are validated when a weight is made or loaded
// (lors_cuda/formats.py), because reading them here would synchronise with the device.
inline void check_sparse24(const char* op, const Tensor& values, const Tensor& metadata, const GridKind* kind) {
  const int64_t columns = values.dim() == 2 ? 2 * values.size(1) * (kind ? kind->codes_per_element : 1) : -1;
  check(columns >= 0 && columns % 4 == 0, "lors::", op, ": the 2:4 values have shape ", shape(values),
        "; they must be [out_features, in_features / 2], an even number in each row.");
  const int64_t N = values.size(0), bytes = sparse24_metadata_bytes(columns);
  check(metadata.scalar_type() == ScalarType::Byte && metadata.dim() == 2 && metadata.size(0) == N && metadata.size(1) == bytes,
        "lors::", op, ": the 2:4 metadata has shape ", shape(metadata), "; it must be uint8 [", N, ", ", bytes,
        "] for values of shape ", shape(values), ".");
  check_values(op, "values", values, kind);
  check_storage(op, "metadata", metadata);
  check_same_device(op, "metadata", metadata, values);
}

// values [count], bits int32 [N, ceil(K/32)], row_offsets int64 [N + 1]: shapes only, as check_sparse24.
inline void check_bitmap(const char* op, const Tensor& values, const Tensor& bits, const Tensor& row_offsets,
                         int64_t in_features, const GridKind* kind) {
  check(values.dim() == 1, "lors::", op, ": the bitmap values have shape ", shape(values), "; they must be one-dimensional.");
  check(row_offsets.scalar_type() == ScalarType::Long && row_offsets.dim() == 1 && row_offsets.size(0) >= 1, "lors::", op,
        ": row_offsets has shape ", shape(row_offsets), "; it must be int64 [out_features + 1].");
  check_bits(op, "bits", bits, row_offsets.size(0) - 1, in_features);
  check_values(op, "values", values, kind);
  check_storage(op, "row_offsets", row_offsets);
  check_same_device(op, "bits", bits, values);
  check_same_device(op, "row_offsets", row_offsets, values);
}

// The weight with its sizes; lora_A gives K where the values do not (bitmap).
inline StoredWeight stored_weight(const char* op, const Tensor& weight, const std::optional<Tensor>& mask,
                                  const std::optional<Tensor>& index, const Tensor& lora_A, const GridArguments& quantization) {
  StoredWeight stored{weight, mask, index, quantization};
  if (!quantization.grid.empty()) {
    for (const GridKind& kind : kGridKinds)
      if (quantization.grid == kind.name) stored.kind = &kind;
    check(stored.kind, "lors::", op, ": grid is '", quantization.grid, "'; it must be 'int8', 'int4' or 'e4m3', or '' for a",
          " weight of values.");
    check(quantization.scales.has_value(), "lors::", op, ": grid is '", quantization.grid, "' and there are no scales.");
  }
  check(stored.kind || (!quantization.scales && !quantization.zero_points && quantization.requantize_steps == 0), "lors::", op,
        ": scales, zero_points or requantize_steps were given without a grid; name it, or leave them out.");
  if (!index) {
    check(weight.dim() == 2, "lors::", op, ": weight has shape ", shape(weight), "; it must be [out_features, in_features].");
    stored.out_features = weight.size(0);
    stored.in_features = weight.size(1) * stored.codes_per_element();
    check_values(op, "weight", weight, stored.kind);
    if (mask && weight.numel() > 0) {
      check_bits(op, "mask", *mask, stored.out_features, stored.in_features);
      check_same_device(op, "mask", *mask, weight);
    }
  } else if (index->scalar_type() == ScalarType::Byte) {
    check(!mask, "lors::", op, ": a 2:4 weight was given with a mask; its metadata is its mask, leave the other out.");
    check_sparse24(op, weight, *index, stored.kind);
    stored.layout = Layout::sparse24;
    stored.out_features = weight.size(0);
    stored.in_features = 2 * weight.size(1) * stored.codes_per_element();
  } else {
    check(mask.has_value(), "lors::", op, ": a bitmap weight was given without its bits; pass them as mask.");
    check(lora_A.dim() >= 2, "lors::", op, ": lora_A has shape ", shape(lora_A), "; it must be [r, in_features].");
    const int64_t K = lora_A.size(lora_A.dim() - 1);
    check_bitmap(op, weight, *mask, *index, K, stored.kind);
    stored.layout = Layout::bitmap;
    stored.out_features = index->size(0) - 1;
    stored.in_features = K;
  }
  check(stored.out_features > 0 && stored.in_features > 0, "lors::", op, ": weight has shape ", stored.shape(),
        "; both sides must be at least 1.");
  check_supported(op, "weight", weight);
  if (stored.kind) check_grid(op, stored);
  return stored;
}

// Whose adapters an operator takes: those of one matrix, lora_A [r, K] and lora_B [N, r]; those of a stack of experts, lora_A
// [E, r, K] and lora_B [E, N, r] of a weight [E N, K]; or both.
enum class Adapters { of_matrix, of_experts, of_either };

// The same with its adapter. Without one, r = 0, the merge decompresses.
inline StoredWeight check_adapted_weight(const char* op, const Tensor& weight, const std::optional<Tensor>& mask,
                                         const std::optional<Tensor>& index, const Tensor& lora_A, const Tensor& lora_B,
                                         const GridArguments& quantization = {}, bool allows_no_rank = false,
                                         Adapters allowed = Adapters::of_matrix) {
  StoredWeight stored = stored_weight(op, weight, mask, index, lora_A, quantization);
  const int64_t K = stored.in_features, dim = lora_A.dim();
  const bool is_stack = allowed == Adapters::of_experts || (allowed == Adapters::of_either && dim == 3);
  const char *of_stack = is_stack ? "experts, " : "", *each = is_stack ? " of all experts" : "";
  check(dim == (is_stack ? 3 : 2) && lora_A.size(dim - 1) == K, "lors::", op, ": lora_A has shape ", shape(lora_A),
        "; it must be [", of_stack, "r, ", K, "] for a weight of shape ", stored.shape(), each, ".");
  const int64_t r = lora_A.size(dim - 2);
  check(r > 0 || allows_no_rank, "lors::", op, ": lora_A has shape ", shape(lora_A), "; the rank r must be at least 1.");
  int64_t N = stored.out_features;
  if (is_stack) {
    stored.experts = lora_A.size(0);
    check(stored.experts > 0 && N % stored.experts == 0, "lors::", op, ": lora_A has shape ", shape(lora_A), " and weight ",
          stored.shape(), "; the rows of the weight must be those of lora_A's experts, the same number for each.");
    N /= stored.experts;
  }
  check(lora_B.dim() == dim && (!is_stack || lora_B.size(0) == stored.experts) && lora_B.size(dim - 2) == N &&
            lora_B.size(dim - 1) == r,
        "lors::", op, ": lora_B has shape ", shape(lora_B), "; it must be [", of_stack, N, ", ", r, "] for a weight of shape ",
        stored.shape(), each, " and lora_A of shape ", shape(lora_A), ".");
  check_floating(op, "lora_A", lora_A);
  check_floating(op, "lora_B", lora_B);
  check_same_device(op, "lora_A", lora_A, weight);
  check_same_device(op, "lora_B", lora_B, weight);
  check_supported(op, "lora_A", lora_A);
  check_supported(op, "lora_B", lora_B);
  return stored;
}

// bias [N], or [experts, N]
inline void check_bias(const char* op, const Tensor& bias, const StoredWeight& weight) {
  const bool is_stack = weight.experts > 0;
  const int64_t N = weight.rows_of_one(), dim = bias.dim();
  check(dim == (is_stack ? 2 : 1) && bias.size(dim - 1) == N && (!is_stack || bias.size(0) == weight.experts), "lors::", op,
        ": bias has shape ", shape(bias), "; it must be [", is_stack ? "experts, " : "", N, "] for a weight of shape ",
        weight.shape(), is_stack ? " of all experts" : "", ".");
  check_floating(op, "bias", bias);
  check_same_device(op, "bias", bias, weight.values);
  check_supported(op, "bias", bias);
}

// A [T, features] activation or gradient that belongs to `weight`. float64 goes with float64 alone.
inline void check_tokens(const char* op, const char* name, const Tensor& t, const StoredWeight& weight, int64_t features) {
  check(t.dim() == 2 && t.size(1) == features, "lors::", op, ": ", name, " has shape ", shape(t), "; it must be [tokens, ",
        features, "] for a weight of shape ", weight.shape(), ".");
  check_floating(op, name, t);
  check((t.scalar_type() == ScalarType::Double) == (weight.dtype() == ScalarType::Double), "lors::", op, ": ", name,
        " and weight must both be float64, or neither.");
  check_same_device(op, name, t, weight.values);
}

// What the merge is to draw: three arguments of the operators.
struct DrawArguments {
  std::optional<int64_t> rounding_seed;
  std::optional<Tensor> noise;
  int64_t noise_seed = 0;
};

inline DrawArguments check_draws(const char* op, const StoredWeight& weight, std::optional<int64_t> rounding_seed,
                                 const std::optional<Tensor>& noise, int64_t noise_seed) {
  if (noise) {
    check(noise->scalar_type() == ScalarType::Float && noise->dim() == 1 && noise->size(0) == weight.out_features, "lors::", op,
          ": noise has shape ", shape(*noise), "; it must be float32 [", weight.out_features, "] for a weight of shape ",
          weight.shape(), ".");
    check_same_device(op, "noise", *noise, weight.values);
    check_storage(op, "noise", *noise);
  }
  check(weight.experts == 0 || (!rounding_seed && !noise), "lors::", op, ": rounding_seed or noise was given with adapters of",
        " experts, whose merge draws nothing; leave it out.");
  check(weight.quantization.requantize_steps == 0 || (!rounding_seed && !noise), "lors::", op,
        ": rounding_seed or noise was given together with requantize_steps; a weight is rounded by chance or put on its grid,",
        " leave one of them out.");
  return {rounding_seed, noise, noise_seed};
}

// Whether matmuls with activations of this dtype read merged values in the weight's compressed layout: on the CPU.
inline bool keeps_stored_layout(const StoredWeight& weight, ScalarType dtype) {
  return weight.layout != Layout::dense && weight.values.is_cpu() && weight.values.scalar_type() == dtype &&
         dtype != ScalarType::Double;
}

// merged as lors::merged_operand makes it for activations of `dtype`, whose matmuls run in `compute`.
inline void check_merged(const char* op, const Tensor& merged, const StoredWeight& weight, ScalarType dtype,
                         ScalarType compute) {
  const bool is_dense = merged.dim() == 2 && merged.size(0) == weight.out_features && merged.size(1) == weight.in_features &&
                        merged.scalar_type() == compute;
  const bool is_stored = keeps_stored_layout(weight, dtype) && merged.scalar_type() == dtype &&
                         merged.dim() == weight.values.dim() && merged.size(0) == weight.values.size(0) &&
                         (merged.dim() == 1 || merged.size(1) == weight.values.size(1));
  check((is_dense || is_stored) && merged.is_contiguous(), "lors::", op, ": merged has shape ", shape(merged),
        "; it must be what lors::merged_operand gives for this weight of shape ", weight.shape(),
        " and the dtype of this call's activations.");
  check_storage(op, "merged", merged);
  check_same_device(op, "merged", merged, weight.values);
}

// Which rows [tokens, features] belong to which expert: int32 [experts], where each one's end; and, for the input, `rows`:
// int32 [S], the token of each row. Shapes and dtypes only: their values are looked at where they can be read (cpu_ops.cpp).
inline void check_groups(const char* op, const Tensor& offsets, const std::optional<Tensor>& rows, const StoredWeight& weight) {
  check(offsets.scalar_type() == ScalarType::Int && offsets.dim() == 1 && offsets.size(0) == weight.experts, "lors::", op,
        ": offsets has shape ", shape(offsets), "; it must be int32 [", weight.experts,
        "], for each expert the row after its last one.");
  check_same_device(op, "offsets", offsets, weight.values);
  check_storage(op, "offsets", offsets);
  if (!rows) return;
  check(rows->scalar_type() == ScalarType::Int && rows->dim() == 1, "lors::", op, ": rows has shape ", shape(*rows),
        "; it must be int32 [rows], for each row the token it is of.");
  check_same_device(op, "rows", *rows, weight.values);
  check_storage(op, "rows", *rows);
}

// Whether the gradient's name is "exact"; refuses names other than "lors" and "exact".
inline bool is_exact(const char* op, const std::string& gradient) {
  check(gradient == "lors" || gradient == "exact", "lors::", op, ": gradient is '", gradient,
        "'; it must be 'lors' or 'exact'.");
  return gradient == "exact";
}

}  // namespace lors::binding
