// SPDX-License-Identifier: Apache-2.0
// merged[n, k] = kept ? weight[n, k] + sum_r B[n, r] A[r, k] : +0     A, B packed in the accumulation type, B times scaling
// One pass for every layout: a tile of kMergeRows x panel lives in registers from the first rank to the rounded store, the
// weight is read once, as it is stored, and sums and rounding are the same code, so the same bits come out. With r = 0 it
// decompresses.
#pragma once

#include "bfloat16_pairs.h"
#include "merge_source.h"
#include "stored_row.h"

namespace {

// All of a panel group's A should stay in the second-level cache while the rows pass by.
constexpr int64_t kMergeGroupBytes = 128 * 1024;

// A thread's share of the result beyond which it leaves the caches by itself.
constexpr int64_t kStreamingBytes = 2 << 20;

// One tile of Rows x Vectors; lora_A is a packed panel [r, Vectors * lanes], lora_B its first row of [N, r].
template <typename Acc, int Rows, int Vectors, typename Source, typename Sink>
inline void merge_tile(const lors::cpu::MergeJob& job, const Acc* lora_A, const Acc* lora_B, Source& source, const Sink& sink) {
  constexpr int panel = Vectors * kLanes<Acc>;
  const int64_t r = job.r;
#if defined(__AVX512F__)
  // Keeps constants of the expansion and the rounding out of the registers of the rank loop, which needs 29 of 32.
  asm volatile("" ::
                   : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",
                     "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24",
                     "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31");
#endif
  Vector<Acc> sum[Rows][Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int u = 0; u < Vectors; ++u) sum[i][u] = Vector<Acc>{};
  source.template prefetch<panel>();
  const auto multiply = [&](const auto& multiply_add) {
    for (int64_t p = 0; p < r; ++p) {
      Vector<Acc> a[Vectors];
#pragma GCC unroll 4
      for (int u = 0; u < Vectors; ++u) a[u] = load_raw<Vector<Acc>>(lora_A + p * panel + u * kLanes<Acc>);
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) {
        const Vector<Acc> b = splat(lora_B[i * r + p]);
#pragma GCC unroll 4
        for (int u = 0; u < Vectors; ++u) sum[i][u] = multiply_add(b, a[u], sum[i][u]);
      }
    }
  };
  if constexpr (kHasPairs && std::is_same_v<Acc, float>) {
    if (job.pairs) {
      multiply(multiply_add_pairs);
      const Vector<float> scaling = splat(job.scaling);
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
        for (int u = 0; u < Vectors; ++u) sum[i][u] = multiply_rounded(sum[i][u], scaling);
    } else {
      multiply([](Vector<Acc> b, Vector<Acc> a, Vector<Acc> s) { return s + b * a; });
    }
  } else {
    multiply([](Vector<Acc> b, Vector<Acc> a, Vector<Acc> s) { return s + b * a; });
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int u = 0; u < Vectors; ++u) sum[i][u] = source.add(i, u, sum[i][u]);
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) sink.template store_row<Acc, Vectors>(source, i, sum[i]);
}

// A row of a tile through buffers of a whole panel, so that nothing beyond its `columns` is touched. Out of line for the sake
// of the registers of the whole tiles.
template <typename Acc, int Vectors, typename Source, typename Sink>
[[gnu::noinline]] inline void merge_edge(const lors::cpu::MergeJob& job, int64_t n, int64_t k, int64_t columns,
                                         const Acc* lora_A, const Acc* lora_B, const Sink& sink) {
  constexpr int panel = Vectors * kLanes<Acc>;
  typename Source::template Edge<panel> edge;
  Source source(job, n, k);
  source.read_edge(edge, columns);
  if constexpr (std::is_void_v<typename Sink::Element>) {
    merge_tile<Acc, 1, Vectors>(job, lora_A, lora_B, source, sink);
  } else {
    typename Sink::Element row[panel / Sink::kColumns];
    merge_tile<Acc, 1, Vectors>(job, lora_A, lora_B, source, Sink{row, 0, false});
    std::memcpy(sink.merged, row, size_t(columns / Sink::kColumns) * sizeof(row[0]));
  }
  source.finish(job, n);
}

// The tile of Rows rows and one panel of Vectors from row n and column k on: whole, or row by row where it ends early or cannot
// be read in whole vectors.
template <typename Acc, int Rows, int Vectors, template <typename, typename, int> typename Source, typename W, typename Sink>
[[gnu::always_inline]] inline void merge_at(const lors::cpu::MergeJob& job, int64_t n, int64_t k, const Acc* lora_A,
                                            const Acc* lora_B, const Sink& sink) {
  constexpr int panel = Vectors * kLanes<Acc>;
  const int64_t r = job.r, columns = job.in_features - k < panel ? job.in_features - k : panel;
  if (columns == panel && Source<Acc, W, Rows>::is_readable(job, n, panel)) {
    Source<Acc, W, Rows> source(job, n, k);
    merge_tile<Acc, Rows, Vectors>(job, lora_A, lora_B, source, sink);
    source.finish(job, n);
    return;
  }
  for (int i = 0; i < Rows; ++i)
    merge_edge<Acc, Vectors, Source<Acc, W, 1>>(job, n + i, k, columns, lora_A, lora_B + i * r, sink.row(i));
}

// Calls tile(rows, n, k, lora_A, lora_B) for tiles of kMergeRows (or one) rows from n on and a panel of columns from k on: the
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
    const auto rows_of = [&](auto rows, int64_t n) {
      for (int64_t q = first; q < last; ++q) tile(rows, n, q * panel, lora_A + q * r * panel, lora_B + n * r);
      return n + rows;
    };
    for (int64_t n = begin; n < end;)
      n = end - n >= kMergeRows ? rows_of(std::integral_constant<int, kMergeRows>{}, n)
                                : rows_of(std::integral_constant<int, 1>{}, n);
  }
}

template <typename Acc, template <typename, typename, int> typename Source, typename W, typename Sink>
void merge_rows(const lors::cpu::MergeJob& job, int64_t begin, int64_t end) {
  const int64_t K = job.in_features, stride = K / Sink::kColumns;
  auto* merged = static_cast<typename Sink::Element*>(job.merged);
  // Large and aligned enough to be stored past the caches. In place, a tile has its lines in a cache already.
  const bool streaming = merged != job.weight && (end - begin) * stride * int64_t(sizeof(*merged)) > kStreamingBytes &&
                         stride % kLanes<Acc> == 0 && reinterpret_cast<uintptr_t>(merged) % kVectorBytes == 0;
  for_each_tile<Acc>(job, begin, end, [&](auto tile_rows, int64_t n, int64_t k, const Acc* a, const Acc* b) {
    merge_at<Acc, decltype(tile_rows)::value, kMergeVectors, Source, W>(
        job, n, k, a, b, Sink{merged + (n * K + k) / Sink::kColumns, stride, streaming});
  });
  if (streaming) streaming_done();
}

template <typename Acc, typename W>
void merge_to_bitmap(const lors::cpu::MergeJob& job, int64_t begin, int64_t end) {
  const BitmapSink<W> sink{static_cast<W*>(job.merged)};
  for_each_tile<Acc>(job, begin, end, [&](auto tile_rows, int64_t n, int64_t k, const Acc* a, const Acc* b) {
    merge_at<Acc, decltype(tile_rows)::value, kMergeVectors, BitmapSource, W>(job, n, k, a, b, sink);
  });
}

template <typename Acc, typename W, typename Out, typename Round>
void merge_to_dense(const lors::cpu::MergeJob& job, int64_t begin, int64_t end) {
  using Sink = DenseSink<Out, Round>;
  switch (job.weight_layout) {
    case lors::Layout::dense: return merge_rows<Acc, DenseSource, W, Sink>(job, begin, end);
    case lors::Layout::sparse24: return merge_rows<Acc, Sparse24Source, W, Sink>(job, begin, end);
    case lors::Layout::bitmap: return merge_rows<Acc, BitmapSource, W, Sink>(job, begin, end);
  }
}

template <typename Acc, typename W>
void merge_from(const lors::cpu::MergeJob& job, int64_t begin, int64_t end) {
  using lors::DType;
  if (job.merged_layout == lors::Layout::bitmap) return merge_to_bitmap<Acc, W>(job, begin, end);
  if (job.merged_layout == lors::Layout::sparse24) return merge_rows<Acc, Sparse24Source, W, Sparse24Sink<W>>(job, begin, end);
  if constexpr (std::is_same_v<Acc, double>)
    return merge_to_dense<double, W, double, double>(job, begin, end);
  else {
    if (job.merged_dtype == DType::bfloat16) return merge_to_dense<float, W, bfloat16, bfloat16>(job, begin, end);
    if (job.merged_dtype == DType::float16) return merge_to_dense<float, W, float16, float16>(job, begin, end);
    if (job.round_to == DType::bfloat16) return merge_to_dense<float, W, float, bfloat16>(job, begin, end);
    if (job.round_to == DType::float16) return merge_to_dense<float, W, float, float16>(job, begin, end);
    return merge_to_dense<float, W, float, float>(job, begin, end);
  }
}

#if defined(__AVX2__)
// Without an adapter 16-bit values that keep their type are only moved to their columns.
template <typename W, template <typename> typename RowOf>
void expand_rows(const lors::cpu::MergeJob& job, int64_t begin, int64_t end) {
  using Row = RowOf<W>;
  const int64_t K = job.in_features, units = K / Row::kUnit;
  for (int64_t n = begin; n < end; ++n) {
    Row row(job, n);
    W* out = static_cast<W*>(job.merged) + n * K;
    for (int64_t u = 0; u < units;) {
      const int64_t last = u + kChunk < units ? u + kChunk : units;
      row.begin(u);
      if (row.readable())
        for (; u < last; ++u) store_words(out + u * Row::kUnit, row.unit(u));
      else
        for (; u < last; ++u) store_words(out + u * Row::kUnit, row.part(u, Row::kUnit));
    }
    if (const int64_t columns = K % Row::kUnit) {
      W unit[Row::kUnit];
      store_words(unit, row.part(units, columns));
      std::memcpy(out + units * Row::kUnit, unit, size_t(columns) * sizeof(W));
    }
  }
}

template <typename W>
void expand_rows(const lors::cpu::MergeJob& job, int64_t begin, int64_t end) {
  job.weight_layout == lors::Layout::sparse24 ? expand_rows<W, Sparse24Row>(job, begin, end)
                                              : expand_rows<W, BitmapRow>(job, begin, end);
}
#endif

template <typename W>
void merge_codes(const lors::cpu::MergeJob& job, int64_t begin, int64_t end) {
  if (job.merged_dtype == lors::DType::bfloat16) return merge_to_dense<float, W, bfloat16, bfloat16>(job, begin, end);
  merge_to_dense<float, W, float, float>(job, begin, end);
}

void merge(const lors::cpu::MergeJob& job, int64_t begin, int64_t end) {
  switch (job.steps.grid) {
    case lors::Grid::int8: return merge_codes<int8_t>(job, begin, end);
    case lors::Grid::int4: return merge_codes<Int4Pair>(job, begin, end);
    case lors::Grid::e4m3: return merge_codes<E4M3>(job, begin, end);
    case lors::Grid::none: break;
  }
#if defined(__AVX2__)
  if (job.r == 0 && job.weight_layout != lors::Layout::dense && job.merged_layout == lors::Layout::dense &&
      job.merged_dtype == job.weight_dtype) {
    if (job.weight_dtype == lors::DType::bfloat16) return expand_rows<bfloat16>(job, begin, end);
    if (job.weight_dtype == lors::DType::float16) return expand_rows<float16>(job, begin, end);
  }
#endif
  switch (job.weight_dtype) {
    case lors::DType::float64: return merge_from<double, double>(job, begin, end);
    case lors::DType::float32: return merge_from<float, float>(job, begin, end);
    case lors::DType::bfloat16: return merge_from<float, bfloat16>(job, begin, end);
    case lors::DType::float16: return merge_from<float, float16>(job, begin, end);
  }
}

void multiply(const lors::cpu::MergeJob& job, int64_t begin, int64_t end) {
  using Sink = DenseSink<float, float>;
  const int64_t K = job.in_features;
  auto* out = static_cast<float*>(job.merged);
  for_each_tile<float>(job, begin, end, [&](auto rows, int64_t n, int64_t k, const float* a, const float* b) {
    merge_at<float, decltype(rows)::value, kMergeVectors, NoSource, float>(job, n, k, a, b, Sink{out + n * K + k, K, false});
  });
}

// Calls f<Source, W, Round>() for a weight and what its merged values are rounded to.
template <template <typename, typename, int> typename Source, typename W, typename F>
inline auto with_rounding(const lors::cpu::MergeJob& job, const F& f) {
  switch (job.round_to) {
    case lors::DType::bfloat16: return f.template operator()<Source, W, bfloat16>();
    case lors::DType::float16: return f.template operator()<Source, W, float16>();
    default: return f.template operator()<Source, W, float>();
  }
}

template <template <typename, typename, int> typename Source, typename W, typename F>
inline auto with_rounding_of_codes(const lors::cpu::MergeJob& job, const F& f) {
  return job.round_to == lors::DType::bfloat16 ? f.template operator()<Source, W, bfloat16>()
                                               : f.template operator()<Source, W, float>();
}

template <template <typename, typename, int> typename Source, typename F>
inline auto with_weight_dtype(const lors::cpu::MergeJob& job, const F& f) {
  switch (job.steps.grid) {
    case lors::Grid::int8: return with_rounding_of_codes<Source, int8_t>(job, f);
    case lors::Grid::int4: return with_rounding_of_codes<Source, Int4Pair>(job, f);
    case lors::Grid::e4m3: return with_rounding_of_codes<Source, E4M3>(job, f);
    case lors::Grid::none: break;
  }
  switch (job.weight_dtype) {
    case lors::DType::bfloat16: return with_rounding<Source, bfloat16>(job, f);
    case lors::DType::float16: return with_rounding<Source, float16>(job, f);
    default: return with_rounding<Source, float>(job, f);
  }
}

template <typename F>
inline auto with_weight(const lors::cpu::MergeJob& job, const F& f) {
  switch (job.weight_layout) {
    case lors::Layout::sparse24: return with_weight_dtype<Sparse24Source>(job, f);
    case lors::Layout::bitmap: return with_weight_dtype<BitmapSource>(job, f);
    default: return with_weight_dtype<DenseSource>(job, f);
  }
}

}  // namespace
