// SPDX-License-Identifier: Apache-2.0
// The operators on masks and on the compressed layouts, the same on every device; operators.h says what a Backend offers. They
// trust what the bytes of a compressed weight say: whoever takes one in from outside asks the *_validate operators first.
#pragma once

#include <lors/bitmap.h>
#include <lors/mask.h>
#include <lors/sparse24.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "adapted_weight.h"
#include "torch_errors.h"

namespace lors::binding {

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
T* mutable_data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <typename Backend>
struct Formats {
  static Tensor mask_pack(const Tensor& mask) {
    check(mask.dim() == 2 && mask.scalar_type() == ScalarType::Bool, "lors::mask_pack: mask has shape ", shape(mask),
          "; it must be a bool tensor [out_features, in_features].");
    check_storage("mask_pack", "mask", mask);
    const Backend backend(mask);
    const Tensor contiguous = row_major(mask);
    Tensor bits = empty(mask, {mask.size(0), mask_words(mask.size(1))}, ScalarType::Int);
    MaskPackArgs args;
    args.out_features = mask.size(0);
    args.in_features = mask.size(1);
    args.mask = data<uint8_t>(contiguous);
    args.bits = mutable_data<uint32_t>(bits);
    check_status(lors::mask_pack(args, backend.host()));
    return bits;
  }

  static Tensor mask_unpack(const Tensor& packed, int64_t in_features) {
    check(packed.dim() == 2 && packed.scalar_type() == ScalarType::Int && in_features >= 0 &&
              packed.size(1) == mask_words(in_features),
          "lors::mask_unpack: bits has shape ", shape(packed), "; it must be int32 [out_features, ", mask_words(in_features),
          "] for in_features = ", in_features, ".");
    check_storage("mask_unpack", "bits", packed);
    const Backend backend(packed);
    const Tensor contiguous = row_major(packed);
    Tensor mask = empty(packed, {packed.size(0), in_features}, ScalarType::Bool);
    MaskUnpackArgs args;
    args.out_features = packed.size(0);
    args.in_features = in_features;
    args.bits = bits(contiguous);
    args.mask = mutable_data<uint8_t>(mask);
    check_status(lors::mask_unpack(args, backend.host()));
    return mask;
  }

  static Tensor mask_nonzero(const Tensor& weight) {
    check_dense("mask_nonzero", weight);
    const Backend backend(weight);
    const Tensor contiguous = row_major(weight);
    Tensor bits = empty(weight, {weight.size(0), mask_words(weight.size(1))}, ScalarType::Int);
    MaskNonzeroArgs args;
    args.out_features = weight.size(0);
    args.in_features = weight.size(1);
    args.weight = contiguous.const_data_ptr();
    args.dtype = dtype_of(weight);
    args.bits = mutable_data<uint32_t>(bits);
    check_status(lors::mask_nonzero(args, backend.host()));
    return bits;
  }

  static Tensor sparse24_inspect(const Tensor& weight, const std::optional<Tensor>& mask) {
    check_groups("sparse24_inspect", weight, mask);
    const Backend backend(weight);
    const Tensor dense = row_major(weight);
    const std::optional<Tensor> kept = row_major(mask);
    Tensor report = empty(weight, {3}, ScalarType::Long);
    static_assert(sizeof(Sparse24Report) == 3 * sizeof(int64_t));
    Sparse24InspectArgs args;
    args.out_features = weight.size(0);
    args.in_features = weight.size(1);
    args.weight = dense.const_data_ptr();
    args.weight_dtype = dtype_of(weight);
    args.mask = bits(kept);
    args.report = mutable_data<Sparse24Report>(report);
    check_status(lors::sparse24_inspect(args, backend.host()));
    return report;
  }

  static std::tuple<Tensor, Tensor> sparse24_compress(const Tensor& weight, const std::optional<Tensor>& mask) {
    check_groups("sparse24_compress", weight, mask);
    const Backend backend(weight);
    const Tensor dense = row_major(weight);
    const std::optional<Tensor> kept = row_major(mask);
    const int64_t N = weight.size(0), K = weight.size(1);
    Tensor values = empty(weight, {N, K / 2}, weight.scalar_type());
    Tensor metadata = empty(weight, {N, sparse24_metadata_bytes(K)}, ScalarType::Byte);
    Sparse24CompressArgs args;
    args.out_features = N;
    args.in_features = K;
    args.weight = dense.const_data_ptr();
    args.weight_dtype = dtype_of(weight);
    args.mask = bits(kept);
    args.values = values.mutable_data_ptr();
    args.metadata = mutable_data<uint8_t>(metadata);
    check_status(lors::sparse24_compress(args, backend.host()));
    return {values, metadata};
  }

  static Tensor sparse24_decompress(const Tensor& values, const Tensor& metadata) {
    check_sparse24("sparse24_decompress", values, metadata);
    check_supported("sparse24_decompress", "values", values);
    const Backend backend(values);
    const Tensor slots = row_major(values), codes = row_major(metadata);
    const int64_t N = values.size(0), K = 2 * values.size(1);
    Tensor weight = empty(values, {N, K}, values.scalar_type());
    Sparse24DecompressArgs args;
    args.out_features = N;
    args.in_features = K;
    args.values = slots.const_data_ptr();
    args.dtype = dtype_of(values);
    args.metadata = data<uint8_t>(codes);
    args.weight = weight.mutable_data_ptr();
    check_status(lors::sparse24_decompress(args, backend.host()));
    return weight;
  }

  static Tensor sparse24_mask(const Tensor& metadata, int64_t in_features) {
    check(metadata.dim() == 2 && metadata.scalar_type() == ScalarType::Byte && in_features >= 0 && in_features % 4 == 0 &&
              metadata.size(1) == sparse24_metadata_bytes(in_features),
          "lors::sparse24_mask: metadata has shape ", shape(metadata), "; it must be uint8 [out_features, ",
          sparse24_metadata_bytes(in_features), "] for in_features = ", in_features, ", a multiple of 4.");
    check_storage("sparse24_mask", "metadata", metadata);
    const Backend backend(metadata);
    const Tensor codes = row_major(metadata);
    Tensor bits = empty(metadata, {metadata.size(0), mask_words(in_features)}, ScalarType::Int);
    Sparse24MaskArgs args;
    args.out_features = metadata.size(0);
    args.in_features = in_features;
    args.metadata = data<uint8_t>(codes);
    args.mask = mutable_data<uint32_t>(bits);
    check_status(lors::sparse24_mask(args, backend.host()));
    return bits;
  }

  static Tensor sparse24_validate(const Tensor& values, const Tensor& metadata) {
    check_sparse24("sparse24_validate", values, metadata);
    check_supported("sparse24_validate", "values", values);
    const Backend backend(values);
    const Tensor slots = row_major(values), codes = row_major(metadata);
    Tensor report = empty(values, {2}, ScalarType::Long);
    Sparse24ValidateArgs args;
    args.out_features = values.size(0);
    args.in_features = 2 * values.size(1);
    args.values = slots.const_data_ptr();
    args.dtype = dtype_of(values);
    args.metadata = data<uint8_t>(codes);
    args.report = mutable_data<int64_t>(report);
    check_status(lors::sparse24_validate(args, backend.host()));
    return report;
  }

  static Tensor sparse24_merge(const Tensor& values, const Tensor& metadata, const Tensor& lora_A, const Tensor& lora_B,
                               double scaling) {
    const StoredWeight stored = check_adapted_weight("sparse24_merge", values, std::nullopt, metadata, lora_A, lora_B);
    check(stored.layout == Layout::sparse24, "lors::sparse24_merge: metadata must be uint8 [out_features, in_features / 8].");
    const Backend backend(values);
    return AdaptedWeight<Backend>("sparse24_merge", backend, stored, lora_A, lora_B, scaling).merged_values();
  }

  static Tensor bitmap_offsets(const Tensor& packed, int64_t in_features) {
    check(packed.dim() == 2, "lors::bitmap_offsets: bits has shape ", shape(packed), "; it must be [out_features, words].");
    check_bits("bitmap_offsets", "bits", packed, packed.size(0), in_features);
    const Backend backend(packed);
    const Tensor contiguous = row_major(packed);
    Tensor row_offsets = empty(packed, {packed.size(0) + 1}, ScalarType::Long);
    BitmapOffsetsArgs args;
    args.out_features = packed.size(0);
    args.in_features = in_features;
    args.bits = bits(contiguous);
    args.row_offsets = mutable_data<int64_t>(row_offsets);
    check_status(lors::bitmap_offsets(args, backend.host()));
    return row_offsets;
  }

  static Tensor bitmap_compress(const Tensor& weight, const Tensor& packed, const Tensor& row_offsets, int64_t count) {
    check_dense("bitmap_compress", weight);
    check(count >= 0 && count <= weight.numel(), "lors::bitmap_compress: count is ", count, "; it must be row_offsets[-1].");
    check(row_offsets.scalar_type() == ScalarType::Long && row_offsets.dim() == 1 && row_offsets.size(0) == weight.size(0) + 1,
          "lors::bitmap_compress: row_offsets has shape ", shape(row_offsets), "; it must be int64 [", weight.size(0) + 1,
          "].");
    check_bits("bitmap_compress", "bits", packed, weight.size(0), weight.size(1));
    check_same_device("bitmap_compress", "bits", packed, weight);
    check_same_device("bitmap_compress", "row_offsets", row_offsets, weight);
    const Backend backend(weight);
    const Tensor dense = row_major(weight), mask = row_major(packed), offsets = row_major(row_offsets);
    check_offsets("bitmap_compress", backend, count, mask, offsets, weight.size(1));
    Tensor values = empty(weight, {count}, weight.scalar_type());
    BitmapCompressArgs args;
    args.out_features = weight.size(0);
    args.in_features = weight.size(1);
    args.weight = dense.const_data_ptr();
    args.dtype = dtype_of(weight);
    args.bits = bits(mask);
    args.row_offsets = data<int64_t>(offsets);
    args.values = values.mutable_data_ptr();
    check_status(lors::bitmap_compress(args, backend.host()));
    return values;
  }

  static Tensor bitmap_decompress(const Tensor& values, const Tensor& packed, const Tensor& row_offsets, int64_t in_features) {
    check_bitmap("bitmap_decompress", values, packed, row_offsets, in_features);
    check_supported("bitmap_decompress", "values", values);
    const Backend backend(values);
    const Tensor contiguous = row_major(values), mask = row_major(packed), offsets = row_major(row_offsets);
    check_offsets("bitmap_decompress", backend, values.size(0), mask, offsets, in_features);
    Tensor weight = empty(values, {packed.size(0), in_features}, values.scalar_type());
    BitmapDecompressArgs args;
    args.out_features = packed.size(0);
    args.in_features = in_features;
    args.values = contiguous.const_data_ptr();
    args.dtype = dtype_of(values);
    args.bits = bits(mask);
    args.row_offsets = data<int64_t>(offsets);
    args.weight = weight.mutable_data_ptr();
    check_status(lors::bitmap_decompress(args, backend.host()));
    return weight;
  }

  static Tensor bitmap_validate(const Tensor& values, const Tensor& packed, const Tensor& row_offsets, int64_t in_features) {
    check_bitmap("bitmap_validate", values, packed, row_offsets, in_features);
    const Backend backend(values);
    const Tensor mask = row_major(packed), offsets = row_major(row_offsets);
    Tensor report = empty(values, {2}, ScalarType::Long);
    BitmapValidateArgs args;
    args.out_features = packed.size(0);
    args.in_features = in_features;
    args.count = values.size(0);
    args.bits = bits(mask);
    args.row_offsets = data<int64_t>(offsets);
    args.report = mutable_data<int64_t>(report);
    check_status(lors::bitmap_validate(args, backend.host()));
    return report;
  }

  // Gives `library` the kernels of one device.
  static void implement(torch::stable::detail::StableLibrary& library) {
    library.impl("mask_pack", TORCH_BOX(&explained<&Formats::mask_pack>));
    library.impl("mask_unpack", TORCH_BOX(&explained<&Formats::mask_unpack>));
    library.impl("mask_nonzero", TORCH_BOX(&explained<&Formats::mask_nonzero>));
    library.impl("sparse24_inspect", TORCH_BOX(&explained<&Formats::sparse24_inspect>));
    library.impl("sparse24_compress", TORCH_BOX(&explained<&Formats::sparse24_compress>));
    library.impl("sparse24_decompress", TORCH_BOX(&explained<&Formats::sparse24_decompress>));
    library.impl("sparse24_mask", TORCH_BOX(&explained<&Formats::sparse24_mask>));
    library.impl("sparse24_validate", TORCH_BOX(&explained<&Formats::sparse24_validate>));
    library.impl("sparse24_merge", TORCH_BOX(&explained<&Formats::sparse24_merge>));
    library.impl("bitmap_offsets", TORCH_BOX(&explained<&Formats::bitmap_offsets>));
    library.impl("bitmap_compress", TORCH_BOX(&explained<&Formats::bitmap_compress>));
    library.impl("bitmap_decompress", TORCH_BOX(&explained<&Formats::bitmap_decompress>));
    library.impl("bitmap_validate", TORCH_BOX(&explained<&Formats::bitmap_validate>));
  }

 private:
  static void check_dense(const char* op, const Tensor& weight) {
    check(weight.dim() == 2, "lors::", op, ": weight has shape ", shape(weight), "; it must be [out_features, in_features].");
    check_floating(op, "weight", weight);
    check_supported(op, "weight", weight);
  }

  static void check_groups(const char* op, const Tensor& weight, const std::optional<Tensor>& mask) {
    check_dense(op, weight);
    check(weight.size(1) % 4 == 0, "lors::", op, ": weight has shape ", shape(weight),
          "; 2:4 needs in_features to be a multiple of 4.");
    if (!mask) return;
    check_bits(op, "mask", *mask, weight.size(0), weight.size(1));
    check_same_device(op, "mask", *mask, weight);
  }
};

}  // namespace lors::binding
