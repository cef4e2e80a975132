// SPDX-License-Identifier: Apache-2.0
// merged[n, k] = kept ? weight[n, k] + sum_r B[n, r] A[r, k] : +0     A, B packed in the accumulation type, B times scaling
// One pass: a tile of kMergeRows x panel lives in registers from the first rank to the rounded store.
#pragma once

#include "expand.h"
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

// Where a tile's weights come from: `prefetch` asks for them while the adapters are multiplied, `add` gives the merged values
// of vector u of row i from its sums. This one is the dense layout; merge_compressed_kernel.h has the others.
template <typename W>
struct DenseSource {
  const W* weight;
  int64_t stride;
  const uint32_t* mask;  // of the first row; null: kept where the weight is not zero
  int64_t words;         // of a row of the mask
  int64_t column;        // of the tile

  template <int Rows, int Columns>
  void prefetch() const {
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int byte = 0; byte < int(Columns * sizeof(W)); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(weight + i * stride) + byte);
  }
  template <typename Acc>
  Vector<Acc> add(int i, int u, Vector<Acc> sum) const {
    const Vector<Acc> w = load<Acc>(weight + i * stride + u * kLanes<Acc>);
    if (!mask) return w != 0 ? w + sum : Vector<Acc>{};
    // The lanes of one vector never straddle a word: 32 is a multiple of every lane count.
    const int64_t k = column + u * kLanes<Acc>, word = k / 32;
    return where_bits<Acc>(word < words ? mask[i * words + word] >> (k % 32) : 0, w + sum);
  }
};

// Where a tile's merged values go: this one into rows of a dense matrix. `streaming`: `merged` is aligned to a vector in every
// row, and too large to be worth keeping in a cache.
template <typename Out, typename Round>
struct DenseSink {
  Out* merged;
  int64_t stride;
  bool streaming;

  template <typename Acc, int Vectors>
  void store_row(int i, const Vector<Acc> (&row)[Vectors]) const {
#pragma GCC unroll 4
    for (int u = 0; u < Vectors; ++u) {
      Out* out = merged + i * stride + u * kLanes<Acc>;
      streaming ? store_streaming<Out, Round, Acc>(out, row[u]) : store<Out, Round, Acc>(out, row[u]);
    }
  }
};

// One tile of Rows x Vectors; lora_A is a packed panel [r, Vectors * lanes], lora_B its first row of [N, r].
template <typename Acc, int Rows, int Vectors, typename Source, typename Sink>
inline void merge_tile(const Acc* lora_A, const Acc* lora_B, int64_t r, Source& source, const Sink& sink) {
  constexpr int panel = Vectors * kLanes<Acc>;
  Vector<Acc> sum[Rows][Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int u = 0; u < Vectors; ++u) sum[i][u] = Vector<Acc>{};
  source.template prefetch<Rows, panel>();
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
    for (int u = 0; u < Vectors; ++u) sum[i][u] = source.template add<Acc>(i, u, sum[i][u]);
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) sink.template store_row<Acc, Vectors>(i, sum[i]);
}

template <typename Acc, typename W, typename Out, typename Round, int Rows, int Vectors>
inline void merge_tile(const Acc* lora_A, const Acc* lora_B, int64_t r, const W* weight, int64_t weight_stride,
                       const uint32_t* mask, int64_t words, int64_t column, Out* merged, int64_t merged_stride,
                       bool streaming = false) {
  DenseSource<W> source{weight, weight_stride, mask, words, column};
  merge_tile<Acc, Rows, Vectors>(lora_A, lora_B, r, source, DenseSink<Out, Round>{merged, merged_stride, streaming});
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

// Calls tile(n, rows, k, lora_A, lora_B) for tiles of kMergeRows (or one) rows from n on and a panel of columns from k on: the
// rows of [begin, end) pass by one group of panels after the other, so that each row's tiles come in the order of its columns.
template <typename Acc, typename Tile>
inline void for_each_tile(const lors::cpu::MergeJob& job, int64_t begin, int64_t end, const Tile& tile) {
  constexpr int panel = kMergePanel<Acc>;
  const int64_t r = job.r, panels = (job.in_features + panel - 1) / panel;
  const auto* lora_A = static_cast<const Acc*>(job.lora_A);
  const auto* lora_B = static_cast<const Acc*>(job.lora_B);
  int64_t group = kMergeGroupBytes / (int64_t(sizeof(Acc)) * panel * (r > 0 ? r : 1));
  if (group < 1) group = 1;
  for (int64_t first = 0; first < panels; first += group) {
    const int64_t last = first + group < panels ? first + group : panels;
    for (int64_t n = begin; n < end;) {
      const int rows = end - n >= kMergeRows ? kMergeRows : 1;
      for (int64_t q = first; q < last; ++q) tile(n, rows, q * panel, lora_A + q * r * panel, lora_B + n * r);
      n += rows;
    }
  }
}

// Whether the rows [begin, end) of a result of `columns` columns are large and aligned enough to be stored past the caches.
template <typename Acc, typename Out>
inline bool is_streaming(const Out* merged, int64_t columns, int64_t begin, int64_t end) {
  return (end - begin) * columns * int64_t(sizeof(Out)) >= kStreamingBytes && columns % kLanes<Acc> == 0 &&
         reinterpret_cast<uintptr_t>(merged) % kVectorBytes == 0;
}

template <typename Acc, typename W, typename Out, typename Round>
void merge_rows(const lors::cpu::MergeJob& job, int64_t begin, int64_t end) {
  constexpr int panel = kMergePanel<Acc>;
  const int64_t K = job.in_features, r = job.r, words = lors::mask_words(K);
  const auto* weight = static_cast<const W*>(job.weight);
  auto* merged = static_cast<Out*>(job.merged);
  const bool streaming = is_streaming<Acc>(merged, K, begin, end);
  for_each_tile<Acc>(job, begin, end, [&](int64_t n, int rows, int64_t k, const Acc* a, const Acc* b) {
    const uint32_t* bits = job.mask ? job.mask + n * words : nullptr;
    const W* w = weight + n * K + k;
    Out* out = merged + n * K + k;
    if (K - k < panel) {
      for (int i = 0; i < rows; ++i)
        merge_edge<Acc, W, Out, Round, kMergeVectors>(a, b + i * r, r, w + i * K, bits ? bits + i * words : nullptr, words, k,
                                                      K - k, out + i * K);
    } else if (rows == kMergeRows) {
      merge_tile<Acc, W, Out, Round, kMergeRows, kMergeVectors>(a, b, r, w, K, bits, words, k, out, K, streaming);
    } else {
      merge_tile<Acc, W, Out, Round, 1, kMergeVectors>(a, b, r, w, K, bits, words, k, out, K, streaming);
    }
  });
  if (streaming) streaming_done();
}

}  // namespace
