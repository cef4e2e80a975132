// SPDX-License-Identifier: Apache-2.0
// out[T, columns] = activation[T, depth] operand[depth, columns] with operand = merged^T (forward) or merged (dX).
// A blocked matmul after Goto and van de Geijn ("Anatomy of high-performance matrix multiplication", 2008) whose packing of an
// operand block is the merge: the weight is read once, and only one block of the merged weight exists at a time.
#pragma once

#include "kernels.h"
#include "merge_kernel.h"
#include "vector.h"

namespace {

// A register tile is rows x two vectors: 12 accumulators of 16 registers, or 24 of 32 with AVX-512.
constexpr int kFusedRows = kVectorBytes == 64 ? 12 : 6;
constexpr int kFusedVectors = 2;
constexpr int kFusedColumns = kFusedVectors * kLanes<float>;
// A depth x column block of the operand (192 KiB) and the block of activations fit a 512 KiB L2 cache together.
constexpr int kFusedDepth = 384;
constexpr int kFusedBlockColumns = 128;
constexpr int kFusedBlockRows = 96;

template <typename T>
void pack_activation_as(const lors::cpu::PackActivationJob& job, int64_t begin, int64_t end) {
  const int64_t panels = (job.tokens + kFusedRows - 1) / kFusedRows;
  const auto* src = static_cast<const T*>(job.src);
  for (int64_t d0 = 0; d0 < job.depth; d0 += kFusedDepth) {
    const int64_t depth = job.depth - d0 < kFusedDepth ? job.depth - d0 : kFusedDepth;
    for (int64_t panel = begin; panel < end; ++panel) {
      float* dst = job.dst + panels * kFusedRows * d0 + panel * kFusedRows * depth;
      for (int i = 0; i < kFusedRows; ++i) {
        const int64_t t = panel * kFusedRows + i;
        if (t < job.tokens) {
          const T* row = src + t * job.depth + d0;
          for (int64_t d = 0; d < depth; ++d) dst[d * kFusedRows + i] = to_acc<float>(row[d]);
        } else {
          for (int64_t d = 0; d < depth; ++d) dst[d * kFusedRows + i] = 0.0f;
        }
      }
    }
  }
}

void pack_activation(const lors::cpu::PackActivationJob& job, int64_t begin, int64_t end) {
  with_type(job.src_dtype, [&](auto t) { pack_activation_as<decltype(t)>(job, begin, end); });
}

// a0 b0 a1 b1 ... of the lower and the upper halves.
#if LORS_VECTOR_BYTES == 64
inline Vector<float> interleave_low(Vector<float> a, Vector<float> b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline Vector<float> interleave_high(Vector<float> a, Vector<float> b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif LORS_VECTOR_BYTES == 32
inline Vector<float> interleave_low(Vector<float> a, Vector<float> b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
inline Vector<float> interleave_high(Vector<float> a, Vector<float> b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
#else
inline Vector<float> interleave_low(Vector<float> a, Vector<float> b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
inline Vector<float> interleave_high(Vector<float> a, Vector<float> b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#endif

// dst[j, i] = src[i, j] for a square of kLanes rows and columns, by log2(kLanes) perfect shuffles.
inline void transpose_square(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
  constexpr int L = kLanes<float>;
  Vector<float> a[L], b[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) a[i] = load_raw<Vector<float>>(src + i * src_stride);
#pragma GCC unroll 4
  for (int stage = 1; stage < L; stage *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      b[2 * i] = interleave_low(a[i], a[i + L / 2]);
      b[2 * i + 1] = interleave_high(a[i], a[i + L / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) a[i] = b[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) store_raw(dst + i * dst_stride, a[i]);
}

// Merged values of rows [n, n + rows) x columns [k, k + columns) into out (row stride out_stride); columns <= a panel. For a
// bitmap, each row must have been read up to column k.
using MergeBlock = void (*)(const lors::cpu::MergeJob& job, int64_t n, int64_t rows, int64_t k, float* out, int64_t out_stride);

template <template <typename, typename, int> typename Source, typename W, typename Round>
void merge_block(const lors::cpu::MergeJob& job, int64_t n, int64_t rows, int64_t k, float* out, int64_t out_stride) {
  const float* lora_A = static_cast<const float*>(job.lora_A) + k * job.r;  // k is a multiple of a panel
  const float* lora_B = static_cast<const float*>(job.lora_B) + n * job.r;
  const auto tile = [&](auto tile_rows, int64_t i) {
    constexpr int Rows = decltype(tile_rows)::value;
    merge_at<float, Rows, kFusedVectors, Source, W>(job, n + i, k, lora_A, lora_B + i * job.r,
                                                    DenseSink<float, Round>{out + i * out_stride, out_stride, false});
    return i + Rows;
  };
  for (int64_t i = 0; i < rows;)
    i = rows - i >= 4 ? tile(std::integral_constant<int, 4>{}, i) : tile(std::integral_constant<int, 1>{}, i);
}

// Where the values of rows [begin, end) of a bitmap go on at column k.
inline void start_cursors(const lors::cpu::MergeJob& job, const int64_t* row_offsets, int64_t begin, int64_t end, int64_t k) {
  const int64_t words = lors::mask_words(job.in_features);
  for (int64_t n = begin; n < end; ++n) {
    const uint32_t* row = job.mask + n * words;
    int64_t before = row_offsets[n];
    for (int64_t w = 0; w < k / 32; ++w) before += __builtin_popcount(row[w]);
    if (k % 32) before += __builtin_popcount(row[k / 32] & ((1u << (k % 32)) - 1));
    job.cursors[n] = before;
  }
}

// One panel of the operand, [depth, kFusedColumns], zeros beyond `columns`. Forward: its columns are rows n of the weight.
inline void merge_panel_forward(const lors::cpu::MergeJob& job, MergeBlock merge_block, int64_t n, int64_t columns, int64_t k0,
                                int64_t depth, float* panel) {
  alignas(64) float tile[kFusedColumns * kFusedColumns];
  if (columns < kFusedColumns) std::memset(tile, 0, sizeof(tile));
  for (int64_t k = 0; k < depth; k += kFusedColumns) {
    const int64_t width = depth - k < kFusedColumns ? depth - k : kFusedColumns;
    merge_block(job, n, columns, k0 + k, tile, kFusedColumns);
    if (width == kFusedColumns) {
      for (int i = 0; i < kFusedColumns; i += kLanes<float>)
        for (int j = 0; j < kFusedColumns; j += kLanes<float>)
          transpose_square(tile + i * kFusedColumns + j, kFusedColumns, panel + (k + j) * kFusedColumns + i, kFusedColumns);
    } else {
      for (int64_t j = 0; j < width; ++j)
        for (int i = 0; i < kFusedColumns; ++i) panel[(k + j) * kFusedColumns + i] = tile[i * kFusedColumns + j];
    }
  }
}

// The same for the input gradient: its columns are columns k of the weight, so nothing is transposed.
inline void merge_panel_input_gradient(const lors::cpu::MergeJob& job, MergeBlock merge_block, int64_t k, int64_t columns,
                                       int64_t n0, int64_t depth, float* panel) {
  if (columns < kFusedColumns) std::memset(panel, 0, size_t(depth * kFusedColumns) * sizeof(float));
  merge_block(job, n0, depth, k, panel, kFusedColumns);
}

// out tile [rows, columns] (+)= activation panel [depth, kFusedRows] x operand panel [depth, kFusedColumns].
inline void matmul_tile(const float* activation, const float* operand, int64_t depth, bool first, const float* bias, float* out,
                        int64_t stride, int64_t rows, int64_t columns) {
  Vector<float> sum[kFusedRows][kFusedVectors];
#pragma GCC unroll 12
  for (int i = 0; i < kFusedRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kFusedVectors; ++v) sum[i][v] = Vector<float>{};
  for (int64_t d = 0; d < depth; ++d) {
    Vector<float> b[kFusedVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kFusedVectors; ++v) b[v] = load_raw<Vector<float>>(operand + d * kFusedColumns + v * kLanes<float>);
#pragma GCC unroll 12
    for (int i = 0; i < kFusedRows; ++i) {
      const Vector<float> a = splat(activation[d * kFusedRows + i]);
#pragma GCC unroll 2
      for (int v = 0; v < kFusedVectors; ++v) sum[i][v] += a * b[v];
    }
  }
  if (rows == kFusedRows && columns == kFusedColumns) {
#pragma GCC unroll 12
    for (int i = 0; i < kFusedRows; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kFusedVectors; ++v) {
        float* o = out + i * stride + v * kLanes<float>;
        const Vector<float> before = !first ? load_raw<Vector<float>>(o)
                                     : bias ? load_raw<Vector<float>>(bias + v * kLanes<float>)
                                            : Vector<float>{};
        store_raw(o, before + sum[i][v]);
      }
    return;
  }
  alignas(64) float edge[kFusedRows * kFusedColumns];
#pragma GCC unroll 12
  for (int i = 0; i < kFusedRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kFusedVectors; ++v) store_raw(edge + i * kFusedColumns + v * kLanes<float>, sum[i][v]);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      float& o = out[i * stride + j];
      o = (!first ? o : bias ? bias[j] : 0.0f) + edge[i * kFusedColumns + j];
    }
}

struct MergeBlockOf {
  template <template <typename, typename, int> typename Source, typename W, typename Round>
  MergeBlock operator()() const {
    return merge_block<Source, W, Round>;
  }
};

void fused_matmul(const lors::cpu::FusedJob& job, int64_t begin, int64_t end, float* scratch, int64_t* cursors) {
  lors::cpu::MergeJob weight = job.weight;
  const int64_t K = weight.in_features, N = job.out_features;
  const int64_t columns = job.input_gradient ? K : N, total_depth = job.input_gradient ? N : K;
  const int64_t token_panels = (job.tokens + kFusedRows - 1) / kFusedRows;
  const MergeBlock merge_block = with_weight(weight, MergeBlockOf{});
  if (job.row_offsets) {
    // In both cases this call reads each row once, by ascending column.
    weight.cursors = cursors;
    const int64_t first = begin * kFusedColumns, last = end * kFusedColumns < columns ? end * kFusedColumns : columns;
    if (job.input_gradient)
      start_cursors(weight, job.row_offsets, 0, N, first);
    else
      start_cursors(weight, job.row_offsets, first, last, 0);
  }
  constexpr int64_t block_panels = kFusedBlockColumns / kFusedColumns, block_tokens = kFusedBlockRows / kFusedRows;
  for (int64_t first_panel = begin; first_panel < end; first_panel += block_panels) {
    const int64_t last_panel = first_panel + block_panels < end ? first_panel + block_panels : end;
    for (int64_t d = 0; d < total_depth; d += kFusedDepth) {
      const int64_t depth = total_depth - d < kFusedDepth ? total_depth - d : kFusedDepth;
      for (int64_t p = first_panel; p < last_panel; ++p) {
        const int64_t column = p * kFusedColumns;
        const int64_t width = columns - column < kFusedColumns ? columns - column : kFusedColumns;
        float* panel = scratch + (p - first_panel) * kFusedColumns * kFusedDepth;
        if (job.input_gradient) {
          merge_panel_input_gradient(weight, merge_block, column, width, d, depth, panel);
        } else {
          merge_panel_forward(weight, merge_block, column, width, d, depth, panel);
        }
      }
      const float* activation = job.activation + token_panels * kFusedRows * d;
      for (int64_t first_token = 0; first_token < token_panels; first_token += block_tokens) {
        const int64_t last_token = first_token + block_tokens < token_panels ? first_token + block_tokens : token_panels;
        for (int64_t p = first_panel; p < last_panel; ++p) {
          const int64_t column = p * kFusedColumns;
          const int64_t width = columns - column < kFusedColumns ? columns - column : kFusedColumns;
          const float* panel = scratch + (p - first_panel) * kFusedColumns * kFusedDepth;
          for (int64_t t = first_token; t < last_token; ++t) {
            const int64_t row = t * kFusedRows;
            const int64_t rows = job.tokens - row < kFusedRows ? job.tokens - row : kFusedRows;
            matmul_tile(activation + t * kFusedRows * depth, panel, depth, d == 0, job.bias ? job.bias + column : nullptr,
                        job.out + row * columns + column, columns, rows, width);
          }
        }
      }
    }
  }
}

}  // namespace
