// SPDX-License-Identifier: Apache-2.0
// The compressed layouts in the core of plain loops (binding.cpp, which includes this between its helpers and its kernels).
#pragma once

namespace lors {
namespace {

// The position in its group that `slot` of a 2:4 code holds; -1: none.
int position(int code, int slot) {
  const int first = code & 3, second = code >> 2;
  if (first < second) return slot ? second : first;
  if (first == second) return slot == (first == 3) ? first : -1;
  return -1;
}

int code_of(const uint8_t* metadata, int64_t n, int64_t g, int64_t K) {
  return metadata[n * sparse24_metadata_bytes(K) + g / 2] >> (g % 2 * 4) & 15;
}

// The slot of a row's values [K/2] that holds column k; -1: not kept.
int64_t slot_of(const uint8_t* metadata, int64_t n, int64_t k, int64_t K) {
  for (int slot = 0; slot < 2; ++slot)
    if (position(code_of(metadata, n, k / 4, K), slot) == k % 4) return k / 4 * 2 + slot;
  return -1;
}

bool has_bit(const uint32_t* bits, int64_t n, int64_t k, int64_t K) { return bits[n * mask_words(K) + k / 32] >> (k % 32) & 1; }

int64_t bits_before(const uint32_t* bits, int64_t n, int64_t k, int64_t K) {
  int64_t count = 0;
  for (int64_t j = 0; j < k; ++j) count += has_bit(bits, n, j, K);
  return count;
}

bool kept(const void* weight, DType dtype, const uint32_t* mask, int64_t n, int64_t k, int64_t K) {
  return mask ? has_bit(mask, n, k, K) : load(weight, dtype, n * K + k) != 0;
}

// Where a stored weight has element [n, k]; -1: not kept.
int64_t where(const MergeArgs& a, int64_t n, int64_t k) {
  const int64_t K = a.in_features;
  if (a.weight_layout == Layout::sparse24) {
    const int64_t slot = slot_of(a.metadata, n, k, K);
    return slot < 0 ? -1 : n * K / 2 + slot;
  }
  if (!kept(a.weight, a.weight_dtype, a.mask, n, k, K)) return -1;
  return a.weight_layout == Layout::bitmap ? a.row_offsets[n] + bits_before(a.mask, n, k, K) : n * K + k;
}

int64_t where(const FusedLinearArgs& a, int64_t n, int64_t k) {
  return kept(a.weight, a.weight_dtype, a.mask, n, k, a.in_features) ? n * a.in_features + k : -1;
}

}  // namespace

Status mask_nonzero(const MaskNonzeroArgs& a, const CudaHost& host) {
  if (Status s = promised(host, {a.dtype}); !s.ok()) return s;
  const int64_t K = a.in_features, words = mask_words(K);
  std::memset(a.bits, 0, 4 * a.out_features * words);
  for (int64_t n = 0; n < a.out_features; ++n)
    for (int64_t k = 0; k < K; ++k)
      if (load(a.weight, a.dtype, n * K + k) != 0) a.bits[n * words + k / 32] |= 1u << (k % 32);
  return {};
}

Status sparse24_inspect(const Sparse24InspectArgs& a, const CudaHost& host) {
  if (Status s = promised(host, {a.weight_dtype}); !s.ok()) return s;
  const int64_t N = a.out_features, K = a.in_features;
  const auto is_kept = [&](int64_t n, int64_t k) { return kept(a.weight, a.weight_dtype, a.mask, n, k, K); };
  *a.report = {0, INT64_MAX, 0};
  for (int64_t n = 0; n < N; ++n)
    for (int64_t g = 0; g < K / 4; ++g) {
      int count = 0;
      for (int64_t k = 4 * g; k < 4 * g + 4; ++k) count += is_kept(n, k);
      if (count > 2 && a.report->offending_groups++ == 0) a.report->first_offender = n * (K / 4) + g;
    }
  for (int64_t begin = 0; begin < N; begin += 4)
    for (int64_t k = 0; k < K; ++k) {
      int count = 0;
      for (int64_t n = begin; n < std::min(begin + 4, N); ++n) count += is_kept(n, k);
      a.report->offending_columns += count > 2;
    }
  return {};
}

Status sparse24_compress(const Sparse24CompressArgs& a, const CudaHost& host) {
  if (Status s = promised(host, {a.weight_dtype}); !s.ok()) return s;
  const int64_t K = a.in_features, bytes = sparse24_metadata_bytes(K);
  std::memset(a.metadata, 0, a.out_features * bytes);
  for (int64_t n = 0; n < a.out_features; ++n)
    for (int64_t g = 0; g < K / 4; ++g) {
      std::vector<int> at;
      for (int i = 0; i < 4; ++i)
        if (kept(a.weight, a.weight_dtype, a.mask, n, 4 * g + i, K)) at.push_back(i);
      const int code = at.empty() ? 1 : at[0] | at.back() << 2;
      a.metadata[n * bytes + g / 2] |= code << (g % 2 * 4);
      for (int slot = 0; slot < 2; ++slot) {
        const int i = position(code, slot);
        store(a.values, a.weight_dtype, n * K / 2 + 2 * g + slot,
              i < 0 ? 0 : load(a.weight, a.weight_dtype, n * K + 4 * g + i) + 0.0);
      }
    }
  return {};
}

Status sparse24_decompress(const Sparse24DecompressArgs& a, const CudaHost& host) {
  if (Status s = promised(host, {a.dtype}); !s.ok()) return s;
  const int64_t K = a.in_features;
  for (int64_t n = 0; n < a.out_features; ++n)
    for (int64_t k = 0; k < K; ++k) {
      const int64_t slot = slot_of(a.metadata, n, k, K);
      store(a.weight, a.dtype, n * K + k, slot < 0 ? 0 : load(a.values, a.dtype, n * K / 2 + slot));
    }
  return {};
}

Status sparse24_mask(const Sparse24MaskArgs& a, const CudaHost& host) {
  if (Status s = promised(host, {}); !s.ok()) return s;
  const int64_t K = a.in_features, words = mask_words(K);
  std::memset(a.mask, 0, 4 * a.out_features * words);
  for (int64_t n = 0; n < a.out_features; ++n)
    for (int64_t k = 0; k < K; ++k)
      if (slot_of(a.metadata, n, k, K) >= 0) a.mask[n * words + k / 32] |= 1u << (k % 32);
  return {};
}

Status sparse24_validate(const Sparse24ValidateArgs& a, const CudaHost& host) {
  if (Status s = promised(host, {a.dtype}); !s.ok()) return s;
  const int64_t K = a.in_features, bytes = sparse24_metadata_bytes(K);
  a.report[0] = 0, a.report[1] = INT64_MAX;
  for (int64_t i = 0; i < a.out_features * bytes; ++i) {
    bool good = true;
    for (int64_t n = i / bytes, g = i % bytes * 2; g < i % bytes * 2 + 2; ++g) {
      const int code = code_of(a.metadata, n, g, K);
      if (4 * g >= K) {
        good &= code == 0;
        continue;
      }
      good &= (code & 3) <= code >> 2 || code == 1;
      for (int slot = 0; slot < 2; ++slot)
        good &= position(code, slot) >= 0 || load(a.values, a.dtype, n * K / 2 + 2 * g + slot) == 0;
    }
    if (!good && a.report[0]++ == 0) a.report[1] = i;
  }
  return {};
}

Status bitmap_offsets(const BitmapOffsetsArgs& a, const CudaHost& host) {
  if (Status s = promised(host, {}); !s.ok()) return s;
  a.row_offsets[0] = 0;
  for (int64_t n = 0; n < a.out_features; ++n)
    a.row_offsets[n + 1] = a.row_offsets[n] + bits_before(a.bits, n, a.in_features, a.in_features);
  return {};
}

Status bitmap_compress(const BitmapCompressArgs& a, const CudaHost& host) {
  if (Status s = promised(host, {a.dtype}); !s.ok()) return s;
  const int64_t K = a.in_features;
  for (int64_t n = 0; n < a.out_features; ++n)
    for (int64_t k = 0, at = a.row_offsets[n]; k < K; ++k)
      if (has_bit(a.bits, n, k, K)) store(a.values, a.dtype, at++, load(a.weight, a.dtype, n * K + k) + 0.0);
  return {};
}

Status bitmap_decompress(const BitmapDecompressArgs& a, const CudaHost& host) {
  if (Status s = promised(host, {a.dtype}); !s.ok()) return s;
  const int64_t K = a.in_features;
  for (int64_t n = 0; n < a.out_features; ++n)
    for (int64_t k = 0, at = a.row_offsets[n]; k < K; ++k)
      store(a.weight, a.dtype, n * K + k, has_bit(a.bits, n, k, K) ? load(a.values, a.dtype, at++) : 0);
  return {};
}

Status bitmap_validate(const BitmapValidateArgs& a, const CudaHost& host) {
  if (Status s = promised(host, {}); !s.ok()) return s;
  const int64_t N = a.out_features, K = a.in_features, padded = 32 * mask_words(K);
  a.report[0] = 0, a.report[1] = INT64_MAX;
  for (int64_t n = 0; n < N; ++n) {
    bool good = a.row_offsets[n + 1] - a.row_offsets[n] == bits_before(a.bits, n, K, K);
    good &= bits_before(a.bits, n, padded, K) == bits_before(a.bits, n, K, K);
    good &= (n > 0 || a.row_offsets[0] == 0) && (n + 1 < N || a.row_offsets[N] == a.count);
    if (!good && a.report[0]++ == 0) a.report[1] = n;
  }
  return {};
}

}  // namespace lors
