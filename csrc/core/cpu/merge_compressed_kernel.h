// SPDX-License-Identifier: Apache-2.0
// The merge of merge_kernel.h from the compressed layouts: a tile's weights are expanded in registers, vector by vector, so the
// weight is read once, in its compressed form, and never exists densely. Sums and rounding are the dense merge's own code.
#pragma once

#include "expand.h"
#include "kernels.h"
#include "merge_kernel.h"
#include "vector.h"

namespace {

template <typename W>
struct Sparse24Source {
  const W* slots;  // of the tile's first row and column
  int64_t stride;
  const uint8_t* metadata;  // the byte with the tile's first group
  int64_t bytes;            // of a row of metadata
  int64_t column;           // of the tile, modulo 8

  template <int Rows, int Columns>
  void prefetch() const {
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int byte = 0; byte < int(Columns / 2 * sizeof(W)); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(slots + i * stride) + byte);
  }
  template <typename Acc>
  Vector<Acc> add(int i, int u, Vector<Acc> sum) const {
    const uint8_t* codes = metadata + i * bytes;
    const int64_t k = column + u * kLanes<Acc>;
    const Vector<Acc> w = load_sparse24<Acc>(slots + i * stride + u * kLanes<Acc> / 4 * 2, codes, k);
    return where_bits<Acc>(metadata_bits<Acc>(kSparse24Codes.kept_of_byte, codes, k), w + sum);
  }
};

template <typename W, int TileRows>
struct BitmapSource {
  const W* values[TileRows];  // the first of the tile in each row; in the end, the first beyond it
  const uint32_t* mask;       // the word with the tile's first column
  int64_t words;              // of a row of the mask
  int64_t column;             // of the tile, modulo 32

  template <int Rows, int Columns>
  void prefetch() const {
    // Half of the weights are expected to be kept.
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int byte = 0; byte < int(Columns / 2 * sizeof(W)); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(values[i]) + byte);
  }
  template <typename Acc>
  Vector<Acc> add(int i, int u, Vector<Acc> sum) {
    const int64_t k = column + u * kLanes<Acc>;
    const uint32_t bits = (mask[i * words + k / 32] >> (k % 32)) & ((1u << kLanes<Acc>)-1);
    const Vector<Acc> w = load_bitmap<Acc>(values[i], bits);
    return where_bits<Acc>(bits, w + sum);
  }
};

// The slots of a tile in layout 2:4.
template <typename W>
struct Sparse24Sink {
  W* slots;
  int64_t stride;
  const uint8_t* metadata;
  int64_t bytes, column;  // as in Sparse24Source
  bool streaming;         // as in DenseSink

  template <typename Acc, int Vectors>
  void store_row(int i, const Vector<Acc> (&row)[Vectors]) const {
#pragma GCC unroll 2
    for (int u = 0; u < Vectors; u += 2)
      store_slots<W, Acc>(slots + i * stride + u / 2 * kLanes<Acc>,
                          slots_of<Acc>(row[u], row[u + 1], metadata + i * bytes, column + u * kLanes<Acc>), streaming);
  }
};

// A row of a tile at the right edge: its slots and metadata in buffers of a whole panel.
template <typename Acc, typename W>
struct Sparse24Edge {
  static constexpr int panel = kMergePanel<Acc>;
  W slots[panel / 2] = {};
  uint8_t metadata[panel / 8 + 1] = {};

  Sparse24Edge(const W* slots_from, const uint8_t* metadata_from, int64_t columns) {
    std::memcpy(slots, slots_from, size_t(columns / 2) * sizeof(W));
    std::memcpy(metadata, metadata_from, size_t(lors::sparse24_metadata_bytes(columns)));
  }
  Sparse24Source<W> source() const { return {slots, 0, metadata, 0, 0}; }
};

template <typename Acc, typename W, typename Out, typename Round>
void merge_rows_sparse24(const lors::cpu::MergeJob& job, int64_t begin, int64_t end) {
  constexpr int panel = kMergePanel<Acc>;
  const int64_t K = job.in_features, r = job.r, bytes = lors::sparse24_metadata_bytes(K);
  const auto* slots = static_cast<const W*>(job.weight);
  auto* merged = static_cast<Out*>(job.merged);
  const bool streaming = is_streaming<Acc>(merged, K, begin, end);
  for_each_tile<Acc>(job, begin, end, [&](int64_t n, int rows, int64_t k, const Acc* a, const Acc* b) {
    Sparse24Source<W> source{slots + n * (K / 2) + k / 2, K / 2, job.metadata + n * bytes + k / 8, bytes,
                             panel % 8 ? k % 8 : 0};
    const DenseSink<Out, Round> sink{merged + n * K + k, K, streaming};
    if (K - k < panel) {
      for (int i = 0; i < rows; ++i) {
        const Sparse24Edge<Acc, W> edge(source.slots + i * (K / 2), source.metadata + i * bytes, K - k);
        Sparse24Source<W> row = edge.source();
        Out out[panel];
        merge_tile<Acc, 1, kMergeVectors>(a, b + i * r, r, row, DenseSink<Out, Round>{out, 0, false});
        std::memcpy(sink.merged + i * K, out, size_t(K - k) * sizeof(Out));
      }
    } else if (rows == kMergeRows) {
      merge_tile<Acc, kMergeRows, kMergeVectors>(a, b, r, source, sink);
    } else {
      merge_tile<Acc, 1, kMergeVectors>(a, b, r, source, sink);
    }
  });
  if (streaming) streaming_done();
}

template <typename Acc, typename W, typename Out, typename Round>
void merge_rows_bitmap(const lors::cpu::MergeJob& job, int64_t begin, int64_t end) {
  constexpr int panel = kMergePanel<Acc>;
  const int64_t K = job.in_features, r = job.r, words = lors::mask_words(K);
  const auto* values = static_cast<const W*>(job.weight);
  auto* merged = static_cast<Out*>(job.merged);
  const bool streaming = is_streaming<Acc>(merged, K, begin, end);
  for (int64_t n = begin; n < end; ++n) job.cursors[n] = job.row_offsets[n];
  for_each_tile<Acc>(job, begin, end, [&](int64_t n, int rows, int64_t k, const Acc* a, const Acc* b) {
    const uint32_t* mask = job.mask + n * words + k / 32;
    const int64_t column = panel % 32 ? k % 32 : 0;
    const DenseSink<Out, Round> sink{merged + n * K + k, K, streaming};
    // Vectors are loaded whole. Rows lie one behind the other, so that only the last can reach beyond all values.
    const bool whole = K - k >= panel && job.cursors[n + rows - 1] + panel <= job.value_count;
    if (whole && rows == kMergeRows) {
      BitmapSource<W, kMergeRows> source{{}, mask, words, column};
      for (int i = 0; i < kMergeRows; ++i) source.values[i] = values + job.cursors[n + i];
      merge_tile<Acc, kMergeRows, kMergeVectors>(a, b, r, source, sink);
      for (int i = 0; i < kMergeRows; ++i) job.cursors[n + i] = source.values[i] - values;
      return;
    }
    for (int i = 0; i < rows; ++i) {
      const int64_t columns = K - k < panel ? K - k : panel, left = job.value_count - job.cursors[n + i];
      W packed[panel] = {};
      uint32_t bits[panel / 32 + 1] = {};
      Out out[panel];
      if (left > 0) std::memcpy(packed, values + job.cursors[n + i], size_t(left < panel ? left : panel) * sizeof(W));
      std::memcpy(bits, mask + i * words, size_t(lors::mask_words(column + columns)) * sizeof(uint32_t));
      BitmapSource<W, 1> row{{packed}, bits, 0, column};
      merge_tile<Acc, 1, kMergeVectors>(a, b + i * r, r, row, DenseSink<Out, Round>{out, 0, false});
      std::memcpy(sink.merged + i * K, out, size_t(columns) * sizeof(Out));
      job.cursors[n + i] += row.values[0] - packed;
    }
  });
  if (streaming) streaming_done();
}

template <typename Acc, typename W>
void sparse24_merge_rows(const lors::cpu::MergeJob& job, int64_t begin, int64_t end) {
  constexpr int panel = kMergePanel<Acc>;
  const int64_t K = job.in_features, r = job.r, bytes = lors::sparse24_metadata_bytes(K);
  const auto* slots = static_cast<const W*>(job.weight);
  auto* merged = static_cast<W*>(job.merged);
  // In place, a tile has read all of its slots before the first is written, and has their lines in a cache.
  const bool streaming = merged != slots && is_streaming<Acc>(merged, K / 2, begin, end);
  for_each_tile<Acc>(job, begin, end, [&](int64_t n, int rows, int64_t k, const Acc* a, const Acc* b) {
    const uint8_t* metadata = job.metadata + n * bytes + k / 8;
    const int64_t at = n * (K / 2) + k / 2;
    Sparse24Source<W> source{slots + at, K / 2, metadata, bytes, panel % 8 ? k % 8 : 0};
    const Sparse24Sink<W> sink{merged + at, K / 2, metadata, bytes, panel % 8 ? k % 8 : 0, streaming};
    if (K - k < panel) {
      for (int i = 0; i < rows; ++i) {
        const Sparse24Edge<Acc, W> edge(source.slots + i * (K / 2), metadata + i * bytes, K - k);
        Sparse24Source<W> row = edge.source();
        W out[panel / 2];
        merge_tile<Acc, 1, kMergeVectors>(a, b + i * r, r, row, Sparse24Sink<W>{out, 0, edge.metadata, 0, 0, false});
        std::memcpy(sink.slots + i * (K / 2), out, size_t((K - k) / 2) * sizeof(W));
      }
    } else if (rows == kMergeRows) {
      merge_tile<Acc, kMergeRows, kMergeVectors>(a, b, r, source, sink);
    } else {
      merge_tile<Acc, 1, kMergeVectors>(a, b, r, source, sink);
    }
  });
  if (streaming) streaming_done();
}

template <typename Acc, typename W, typename Out, typename Round>
void merge_layout(const lors::cpu::MergeJob& job, int64_t begin, int64_t end) {
  if (job.weight_layout == lors::Layout::sparse24) return merge_rows_sparse24<Acc, W, Out, Round>(job, begin, end);
  if (job.weight_layout == lors::Layout::bitmap) return merge_rows_bitmap<Acc, W, Out, Round>(job, begin, end);
  merge_rows<Acc, W, Out, Round>(job, begin, end);
}

template <typename W>
void merge_to(const lors::cpu::MergeJob& job, int64_t begin, int64_t end) {
  using lors::DType;
  if (job.merged_dtype == DType::float32) {
    if (job.round_to == DType::bfloat16) return merge_layout<float, W, float, bfloat16>(job, begin, end);
    if (job.round_to == DType::float16) return merge_layout<float, W, float, float16>(job, begin, end);
    return merge_layout<float, W, float, float>(job, begin, end);
  }
  if (job.merged_dtype == DType::bfloat16) return merge_layout<float, W, bfloat16, bfloat16>(job, begin, end);
  return merge_layout<float, W, float16, float16>(job, begin, end);
}

void merge(const lors::cpu::MergeJob& job, int64_t begin, int64_t end) {
  switch (job.weight_dtype) {
    case lors::DType::float64: return merge_layout<double, double, double, double>(job, begin, end);
    case lors::DType::float32: return merge_to<float>(job, begin, end);
    case lors::DType::bfloat16: return merge_to<bfloat16>(job, begin, end);
    case lors::DType::float16: return merge_to<float16>(job, begin, end);
  }
}

void sparse24_merge(const lors::cpu::MergeJob& job, int64_t begin, int64_t end) {
  switch (job.weight_dtype) {
    case lors::DType::float64: return sparse24_merge_rows<double, double>(job, begin, end);
    case lors::DType::float32: return sparse24_merge_rows<float, float>(job, begin, end);
    case lors::DType::bfloat16: return sparse24_merge_rows<float, bfloat16>(job, begin, end);
    case lors::DType::float16: return sparse24_merge_rows<float, float16>(job, begin, end);
  }
}

}  // namespace
