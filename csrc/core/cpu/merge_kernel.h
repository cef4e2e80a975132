// SPDX-License-Identifier: Apache-2.0
// merged[n, k] = kept ? weight[n, k] + sum_r B[n, r] A[r, k] : +0     A, B packed in the accumulation type, B times scaling
// One pass: a tile of kMergeRows x panel lives in registers from the first rank to the rounded store.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace {

// Six rows of two vectors (four with AVX-512's 32 registers) leave room for the operands.
constexpr int kMergeRows = 6;
constexpr int kMergeVectors = kVectorBytes == 64 ? 4 : 2;
template <typename Acc>
constexpr int kMergePanel = kMergeVectors * kLanes<Acc>;

// All of a panel group's A should stay in the second-level cache while the rows pass by.
constexpr int64_t kMergeGroupBytes = 128 * 1024;

// A thread's share of the result from which on it leaves the caches by itself.
constexpr int64_t kStreamingBytes = 2 << 20;

template <typename Acc>
inline Keep<Acc> kept_by_bits(const uint32_t* bits, int64_t words, int64_t column) {
  // The lanes of one vector never straddle a word: 32 is a multiple of every lane count.
  const int64_t word = column / 32;
  const uint32_t shifted = word < words ? bits[word] >> (column % 32) : 0;
  Keep<Acc> lane;
  for (int i = 0; i < kLanes<Acc>; ++i) lane[i] = i;
  return -(((Keep<Acc>{} + shifted) >> lane) & 1);
}

// One tile of Rows x Vectors; lora_A is a packed panel [r, Vectors * lanes], lora_B its first row of [N, r].
// `streaming`: `merged` is aligned to a vector in every row, and too large to be worth keeping in a cache.
template <typename Acc, typename W, typename Out, typename Round, int Rows, int Vectors>
inline void merge_tile(const Acc* lora_A, const Acc* lora_B, int64_t r, const W* weight, int64_t weight_stride,
                       const uint32_t* mask, int64_t words, int64_t column, Out* merged, int64_t merged_stride,
                       bool streaming = false) {
  constexpr int panel = Vectors * kLanes<Acc>;
  Vector<Acc> sum[Rows][Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int u = 0; u < Vectors; ++u) sum[i][u] = Vector<Acc>{};
  // The weight is on its way from memory while the adapters are multiplied.
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int byte = 0; byte < int(panel * sizeof(W)); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(weight + i * weight_stride) + byte);
  for (int64_t p = 0; p < r; ++p) {
    Vector<Acc> a[Vectors];
#pragma GCC unroll 4
    for (int u = 0; u < Vectors; ++u) a[u] = load_raw<Vector<Acc>>(lora_A + p * panel + u * kLanes<Acc>);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const Vector<Acc> b = splat(lora_B[i * r + p]);
#pragma GCC unroll 4
      for (int u = 0; u < Vectors; ++u) sum[i][u] += b * a[u];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int u = 0; u < Vectors; ++u) {
      const Vector<Acc> w = load<Acc>(weight + i * weight_stride + u * kLanes<Acc>);
      const Keep<Acc> keep = mask ? kept_by_bits<Acc>(mask + i * words, words, column + u * kLanes<Acc>) : Keep<Acc>(w != 0);
      sum[i][u] = keep ? w + sum[i][u] : Vector<Acc>{};
    }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int u = 0; u < Vectors; ++u) {
      Out* out = merged + i * merged_stride + u * kLanes<Acc>;
      streaming ? store_streaming<Out, Round, Acc>(out, sum[i][u]) : store<Out, Round, Acc>(out, sum[i][u]);
    }
}

// A row of a tile at the right edge: through buffers of a whole panel, so that nothing beyond column K is touched.
template <typename Acc, typename W, typename Out, typename Round, int Vectors>
inline void merge_edge(const Acc* lora_A, const Acc* lora_B, int64_t r, const W* weight, const uint32_t* mask, int64_t words,
                       int64_t column, int64_t columns, Out* merged) {
  W weight_row[Vectors * kLanes<Acc>] = {};
  Out merged_row[Vectors * kLanes<Acc>];
  std::memcpy(weight_row, weight, size_t(columns) * sizeof(W));
  merge_tile<Acc, W, Out, Round, 1, Vectors>(lora_A, lora_B, r, weight_row, 0, mask, words, column, merged_row, 0);
  std::memcpy(merged, merged_row, size_t(columns) * sizeof(Out));
}

template <typename Acc, typename W, typename Out, typename Round>
void merge_rows(const lors::cpu::MergeJob& job, int64_t begin, int64_t end) {
  constexpr int panel = kMergePanel<Acc>;
  const int64_t K = job.in_features, r = job.r, words = lors::mask_words(K);
  const auto* weight = static_cast<const W*>(job.weight);
  auto* merged = static_cast<Out*>(job.merged);
  const auto* lora_A = static_cast<const Acc*>(job.lora_A);
  const auto* lora_B = static_cast<const Acc*>(job.lora_B);
  const int64_t panels = (K + panel - 1) / panel;
  int64_t group = kMergeGroupBytes / (int64_t(sizeof(Acc)) * panel * (r > 0 ? r : 1));
  if (group < 1) group = 1;
  const bool streaming = (end - begin) * K * int64_t(sizeof(Out)) >= kStreamingBytes && K % kLanes<Acc> == 0 &&
                         reinterpret_cast<uintptr_t>(merged) % kVectorBytes == 0;
  for (int64_t first = 0; first < panels; first += group) {
    const int64_t last = first + group < panels ? first + group : panels;
    for (int64_t n = begin; n < end;) {
      const int rows = end - n >= kMergeRows ? kMergeRows : 1;
      const uint32_t* bits = job.mask ? job.mask + n * words : nullptr;
      for (int64_t q = first; q < last; ++q) {
        const int64_t k = q * panel;
        const Acc* a = lora_A + q * r * panel;
        const Acc* b = lora_B + n * r;
        const W* w = weight + n * K + k;
        Out* out = merged + n * K + k;
        if (K - k < panel) {
          for (int i = 0; i < rows; ++i)
            merge_edge<Acc, W, Out, Round, kMergeVectors>(a, b + i * r, r, w + i * K, bits ? bits + i * words : nullptr, words,
                                                          k, K - k, out + i * K);
        } else if (rows == kMergeRows) {
          merge_tile<Acc, W, Out, Round, kMergeRows, kMergeVectors>(a, b, r, w, K, bits, words, k, out, K, streaming);
        } else {
          merge_tile<Acc, W, Out, Round, 1, kMergeVectors>(a, b, r, w, K, bits, words, k, out, K, streaming);
        }
      }
      n += rows;
    }
  }
  if (streaming) streaming_done();
}

template <typename W>
void merge_to(const lors::cpu::MergeJob& job, int64_t begin, int64_t end) {
  using lors::DType;
  if (job.merged_dtype == DType::float32) {
    if (job.round_to == DType::bfloat16) return merge_rows<float, W, float, bfloat16>(job, begin, end);
    if (job.round_to == DType::float16) return merge_rows<float, W, float, float16>(job, begin, end);
    return merge_rows<float, W, float, float>(job, begin, end);
  }
  if (job.merged_dtype == DType::bfloat16) return merge_rows<float, W, bfloat16, bfloat16>(job, begin, end);
  return merge_rows<float, W, float16, float16>(job, begin, end);
}

void merge(const lors::cpu::MergeJob& job, int64_t begin, int64_t end) {
  switch (job.weight_dtype) {
    case lors::DType::float64: return merge_rows<double, double, double, double>(job, begin, end);
    case lors::DType::float32: return merge_to<float>(job, begin, end);
    case lors::DType::bfloat16: return merge_to<bfloat16>(job, begin, end);
    case lors::DType::float16: return merge_to<float16>(job, begin, end);
  }
}

}  // namespace
