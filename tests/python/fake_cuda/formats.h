// SPDX-License-Identifier: Apache-2.0
// The compressed layouts and the grids of codes in the core of plain loops (binding.cpp, which includes this between its
// helpers and its kernels).
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

// Where a stored weight of MergeArgs or FusedLinearArgs has element [n, k]; -1: not kept.
template <typename Args>
int64_t where(const Args& a, int64_t n, int64_t k) {
  const int64_t K = a.in_features;
  if (a.weight_layout == Layout::sparse24) {
    const int64_t slot = slot_of(a.metadata, n, k, K);
    return slot < 0 ? -1 : n * K / 2 + slot;
  }
  if (!kept(a.weight, a.weight_dtype, a.mask, n, k, K)) return -1;
  return a.weight_layout == Layout::bitmap ? a.row_offsets[n] + bits_before(a.mask, n, k, K) : n * K + k;
}

// Number `at` of the codes of a quantised weight, without its zero point.
double code_at(const void* codes, Grid grid, int64_t at) {
  const auto* const bytes = static_cast<const uint8_t*>(codes);
  if (grid == Grid::int8) return static_cast<int8_t>(bytes[at]);
  if (grid == Grid::int4) return ((bytes[at / 2] >> (at % 2 * 4) & 15) ^ 8) - 8;
  return torch::headeronly::Float8_e4m3fn(bytes[at], torch::headeronly::Float8_e4m3fn::from_bits());
}

// Element [n, k] on its group's grid: lors/quantization.h.
double requantized(float merged, const Quantization& q, int64_t n, int64_t k, double scale, double zero) {
  if (!std::isfinite(merged)) return NAN;
  const double step = static_cast<double>(q.requantize_steps) * scale;
  const float inverse = static_cast<float>(1 / step);
  if (q.grid == Grid::e4m3) return torch::headeronly::Float8_e4m3fn(std::clamp(merged * inverse, -448.f, 448.f)) * step + 0;
  const auto column = static_cast<uint32_t>(k);
  const auto whole =
      static_cast<int32_t>(random_dither(random_row(static_cast<uint64_t>(q.dither_seed), q.first_row + n), column));
  const float u = q.dither_seed < 0 ? 0.f : static_cast<float>(whole) * kDitherUnit;
  const double half = q.grid == Grid::int4 || q.requantize_steps == 16 ? 8 : 128, moved = zero / q.requantize_steps;
  return (std::clamp(std::nearbyint(std::fma(merged, inverse, u)) + moved, -half, half - 1) - moved) * step;
}

}  // namespace

Status sparse24_mask(const Sparse24MaskArgs& a, const CudaHost& host) {
  if (Status s = promised(host, {}); !s.ok()) return s;
  const int64_t K = a.in_features, words = mask_words(K);
  std::memset(a.mask, 0, 4 * a.out_features * words);
  for (int64_t n = 0; n < a.out_features; ++n)
    for (int64_t k = 0; k < K; ++k)
      if (slot_of(a.metadata, n, k, K) >= 0) a.mask[n * words + k / 32] |= 1u << (k % 32);
  return {};
}

}  // namespace lors
