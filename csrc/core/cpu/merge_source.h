// SPDX-License-Identifier: Apache-2.0
// How the merge (merge_kernel.h) reads a frozen weight, and where the merged values go. A weight stored in another way (one per
// expert) is one more Source, and one more line in merge_kernel.h; W is the type of its values, or of its codes (codes.h). A
// Source<Acc, W, Rows> is a tile of Rows rows and one panel of columns and offers
//   Source(job, n, k)             the tile whose first row and column these are
//   is_readable(job, n, columns)  whether it can be read in whole vectors where all its columns exist
//   prefetch<Columns>()           asks for it while the adapters are multiplied
//   add(i, u, sum)                merged values of vector u of row i from its sums: +0 where nothing is kept
//   finish(job, n)                after the last `add`
//   read_edge(edge, columns)      for a tile of one row that ends early: copies it into the buffers of an Edge<panel's columns>
// and a Sink, of the tile's first row and column
//   store_row(source, i, row)     takes row i of the tile
//   row(i)                        the Sink of a tile that begins i rows further down
//   Element, kColumns             what it stores to `merged`, and how many columns each of them holds; void: it stores nothing
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

template <int Count, typename W>
inline void prefetch_elements(const void* from) {
#pragma GCC unroll 4
  for (int byte = 0; byte < int(Count * sizeof(W) / kCodesPerElement<W>); byte += 64)
    __builtin_prefetch(static_cast<const char*>(from) + byte);
}

template <typename Acc, typename W, int Rows>
struct DenseSource {
  const W* weight;
  int64_t stride;
  int64_t words;         // of a row of the mask
  const uint32_t* mask;  // of the first row; null: kept where the weight is not zero
  int64_t column;        // of the tile
  TileGrid<W> grid;

  template <typename Job>
  DenseSource(const Job& job, int64_t n, int64_t k)
      : weight(forward(static_cast<const W*>(job.weight), n * job.in_features + k)),
        stride(job.in_features),
        words(lors::mask_words(stride)),
        mask(job.mask ? job.mask + n * words : nullptr),
        column(k),
        grid(job.steps, n, k) {}
  static bool is_readable(const lors::cpu::MergeJob&, int64_t, int) { return true; }
  template <int Columns>
  void prefetch() const {
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) prefetch_elements<Columns, W>(forward(weight, i * stride));
  }
  Vector<Acc> add(int i, int u, Vector<Acc> sum) const {
    const Vector<Acc> w = grid.weights(i, u, load<Acc>(forward(weight, i * stride + u * kLanes<Acc>)));
    if (!mask) return w != 0 ? w + sum : Vector<Acc>{};
    // The lanes of one vector never straddle a word: 32 is a multiple of every lane count.
    const int64_t k = column + u * kLanes<Acc>, word = k / 32;
    return where_bits<Acc>(word < words ? mask[i * words + word] >> (k % 32) : 0, w + sum);
  }
  void finish(const lors::cpu::MergeJob&, int64_t) const {}

  template <int Columns>
  struct Edge {
    W weight[Columns / kCodesPerElement<W>] = {};
  };
  template <int Columns>
  void read_edge(Edge<Columns>& edge, int64_t columns) {
    std::memcpy(edge.weight, weight, size_t(columns / kCodesPerElement<W>) * sizeof(W));
    weight = edge.weight;
  }
};

template <typename Acc, typename W, int Rows>
struct Sparse24Source {
  const W* slots;
  int64_t stride;
  int64_t bytes;            // of a row of metadata
  const uint8_t* metadata;  // the byte with the tile's first group
  int64_t column;           // of the tile, modulo 8
  TileGrid<W> grid;

  Sparse24Source(const lors::cpu::MergeJob& job, int64_t n, int64_t k)
      : slots(forward(static_cast<const W*>(job.weight), (n * job.in_features + k) / 2)),
        stride(job.in_features / 2),
        bytes(lors::sparse24_metadata_bytes(job.in_features)),
        metadata(job.metadata + n * bytes + k / 8),
        column(kMergePanel<Acc> % 8 ? k % 8 : 0),
        grid(job.steps, n, k) {}
  static bool is_readable(const lors::cpu::MergeJob&, int64_t, int) { return true; }
  template <int Columns>
  void prefetch() const {
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) prefetch_elements<Columns / 2, W>(forward(slots, i * stride));
  }
  Vector<Acc> add(int i, int u, Vector<Acc> sum) const {
    const uint8_t* codes = metadata + i * bytes;
    const int64_t k = column + u * kLanes<Acc>;
    const Vector<Acc> packed = load_sparse24<Acc>(forward(slots, i * stride + u * kLanes<Acc> / 4 * 2), codes, k);
    const Vector<Acc> w = grid.weights(i, u, packed);
    return where_bits<Acc>(metadata_bits<Acc>(kSparse24Codes.kept_of_byte, codes, k), w + sum);
  }
  void finish(const lors::cpu::MergeJob&, int64_t) const {}

  template <int Columns>
  struct Edge {
    W slots[Columns / 2 / kCodesPerElement<W>] = {};
    uint8_t metadata[Columns / 8 + 2] = {};
  };
  template <int Columns>
  void read_edge(Edge<Columns>& edge, int64_t columns) {
    std::memcpy(edge.slots, slots, size_t(columns / 2 / kCodesPerElement<W>) * sizeof(W));
    std::memcpy(edge.metadata, metadata, size_t(lors::sparse24_metadata_bytes(column + columns)));
    slots = edge.slots;
    metadata = edge.metadata;
  }
};

template <typename Acc, typename W, int Rows>
struct BitmapSource {
  int64_t cursor, left;       // where `first` is in all values, and how many there are from there on
  PointerTo<W> first;         // one row: its first value of the tile
  PointerTo<W> values[Rows];  // the tile's first in each row; in the end, the first beyond it
  int64_t words;              // of a row of the mask
  const uint32_t* mask;       // the word with the tile's first column
  int64_t column;             // of the tile, modulo 32
  TileGrid<W> grid;

  [[gnu::always_inline]] BitmapSource(const lors::cpu::MergeJob& job, int64_t n, int64_t k)
      : cursor(Rows == 1 ? job.cursors[n] : 0),  // a constant where no edge is read, for the registers' sake
        left(job.value_count - cursor),
        first(pointer_to<W>(job.weight, cursor)),
        words(lors::mask_words(job.in_features)),
        mask(job.mask + n * words + k / 32),
        column(kMergePanel<Acc> % 32 ? k % 32 : 0),
        grid(job.steps, n, k) {
    for (int i = 0; i < Rows; ++i) values[i] = first + (job.cursors[n + i] - cursor);
  }
  // Rows lie one behind the other, so that only the last can reach beyond all values.
  static bool is_readable(const lors::cpu::MergeJob& job, int64_t n, int columns) {
    return job.cursors[n + Rows - 1] + columns + kReadBeyond<W> <= job.value_count;
  }
  template <int Columns>
  void prefetch() const {
    // Half of the weights are expected to be kept.
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) prefetch_elements<Columns / 2, W>(address(values[i]));
  }
  uint32_t kept_bits(int i, int u) const {
    const int64_t k = column + u * kLanes<Acc>;
    return (mask[i * words + k / 32] >> (k % 32)) & ((1u << kLanes<Acc>)-1);
  }
  Vector<Acc> add(int i, int u, Vector<Acc> sum) {
    const uint32_t bits = kept_bits(i, u);
    const Vector<Acc> w = grid.weights(i, u, load_bitmap<Acc>(values[i], bits));
    return where_bits<Acc>(bits, w + sum);
  }
  void finish(const lors::cpu::MergeJob& job, int64_t n) const {
    for (int i = 0; i < Rows; ++i) job.cursors[n + i] = cursor + (values[i] - first);
  }

  template <int Columns>
  struct Edge {
    W values[(Columns + kReadBeyond<W>) / kCodesPerElement<W>] = {};
    uint32_t mask[Columns / 32 + 1] = {};
  };
  template <int Columns>
  void read_edge(Edge<Columns>& edge, int64_t columns) {
    first = values[0] = copy_codes(edge.values, first, left < 0 ? 0 : left < Columns ? left : Columns);
    std::memcpy(edge.mask, mask, size_t(lors::mask_words(column + columns)) * sizeof(uint32_t));
    mask = edge.mask;
  }
};

// No weight: every entry is its sum.
template <typename Acc, typename, int>
struct NoSource {
  NoSource(const lors::cpu::MergeJob&, int64_t, int64_t) {}
  static bool is_readable(const lors::cpu::MergeJob&, int64_t, int) { return true; }
  template <int>
  void prefetch() const {}
  Vector<Acc> add(int, int, Vector<Acc> sum) const { return sum; }
  void finish(const lors::cpu::MergeJob&, int64_t) const {}

  template <int>
  struct Edge {};
  template <int Columns>
  void read_edge(Edge<Columns>&, int64_t) {}
};

template <typename Out, typename Round>
struct DenseSink {
  using Element = Out;
  static constexpr int kColumns = 1;
  Out* merged;
  int64_t stride;
  bool streaming;  // `merged` is aligned to a vector in every row, and too large to be worth keeping in a cache

  DenseSink row(int i) const { return {merged + i * stride, stride, false}; }
  template <typename Acc, int Vectors, typename Source>
  [[gnu::always_inline]] void store_row(const Source&, int i, const Vector<Acc> (&row)[Vectors]) const {
#pragma GCC unroll 4
    for (int u = 0; u < Vectors; ++u) {
      Out* out = merged + i * stride + u * kLanes<Acc>;
      streaming ? store_streaming<Out, Round, Acc>(out, row[u]) : store<Out, Round, Acc>(out, row[u]);
    }
  }
};

// The kept values of a BitmapSource, where its own are in all values.
template <typename W>
struct BitmapSink {
  using Element = void;
  W* merged;  // of the whole weight

  BitmapSink row(int) const { return *this; }
  template <typename Acc, int Vectors, typename Source>
  [[gnu::always_inline]] void store_row(const Source& source, int i, const Vector<Acc> (&row)[Vectors]) const {
    uint32_t kept[Vectors];
    W* out = merged + source.cursor + (source.values[i] - source.first);  // beyond the tile, for `add` has read it
    for (int u = 0; u < Vectors; ++u) {
      kept[u] = source.kept_bits(i, u);
      out -= __builtin_popcount(kept[u]);
    }
    for (int u = 0; u < Vectors; ++u) {
      store_kept<W, Acc>(out, row[u], kept[u]);
      out += __builtin_popcount(kept[u]);
    }
  }
};

// The slots that the metadata of a Sparse24Source names.
template <typename W>
struct Sparse24Sink {
  using Element = W;
  static constexpr int kColumns = 2;
  W* merged;
  int64_t stride;
  bool streaming;  // as in DenseSink

  Sparse24Sink row(int i) const { return {merged + i * stride, stride, false}; }
  template <typename Acc, int Vectors, typename Source>
  [[gnu::always_inline]] void store_row(const Source& source, int i, const Vector<Acc> (&row)[Vectors]) const {
#pragma GCC unroll 2
    for (int u = 0; u < Vectors; u += 2)
      store_slots<W, Acc>(
          merged + i * stride + u / 2 * kLanes<Acc>,
          slots_of<Acc>(row[u], row[u + 1], source.metadata + i * source.bytes, source.column + u * kLanes<Acc>), streaming);
  }
};

}  // namespace
