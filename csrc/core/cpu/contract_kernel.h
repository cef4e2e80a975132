// SPDX-License-Identifier: Apache-2.0
// The two matmuls of every adapter gradient, a matrix S [I, J], optionally masked, times a thin factor:
//   contract_rows     out[i, :] = sum_j S[i, j] factor[j, :]         P = X A^T, Q = dY B, and (M o G) A^T
//   contract_columns  out[j, :] = sum_i S[i, j] factor[i, :]         dY^T P, X^T Q, and (M o G)^T B
// S is converted to the accumulation type and masked by blocks that stay in the L1 cache.
#pragma once

#include "bfloat16_pairs.h"
#include "expand.h"
#include "kernels.h"
#include "vector.h"

namespace {

// Of a panel of 16 columns. Twelve accumulators hide the latency of a fused multiply-add.
template <typename Acc>
constexpr int kThinVectors = int(lors::cpu::kThinWidth) / kLanes<Acc>;
template <typename Acc>
constexpr int kThinRows = kThinVectors<Acc> >= 12 ? 1 : 12 / kThinVectors<Acc>;

// Blocks of S; both are multiples of every kThinRows (12, 6, 3, 1).
constexpr int kRowsBlockI = 24, kRowsBlockJ = 256;
constexpr int kColumnsBlockI = 64, kColumnsBlockJ = 96;

template <typename Bits, typename Acc>
inline void zero_where_zero(Acc* row, const void* kept_where, int64_t offset, int64_t count) {
  const Bits* kept = static_cast<const Bits*>(kept_where) + offset;
  for (int64_t j = 0; j < count; ++j) row[j] = Bits(kept[j] << 1) != 0 ? row[j] : Acc(0);  // the shift drops the sign of -0.0
}

// buffer[0..height) x [0..width) = S[i0.., j0..) as Acc, masked, zero beyond rows x columns.
template <typename Acc, typename T>
inline void load_block(const lors::cpu::ContractJob& job, int64_t i0, int64_t rows, int64_t height, int64_t j0, int64_t columns,
                       int64_t width, Acc* buffer) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* src = static_cast<const T*>(job.matrix) + (i0 + i) * job.columns + j0;
    Acc* row = buffer + i * width;
    int64_t j = 0;
    for (; j + kLanes<Acc> <= columns; j += kLanes<Acc>) store_raw(row + j, load<Acc>(src + j));
    for (; j < columns; ++j) row[j] = to_acc<Acc>(src[j]);
    if (job.mask) {
      const uint32_t* words = job.mask + (i0 + i) * lors::mask_words(job.columns);
      for (j = 0; j + kLanes<Acc> <= columns; j += kLanes<Acc>) {
        const int64_t first = j0 + j;  // may be any column, so that a vector's bits can be in two words
        uint64_t bits = words[first / 32];
        if (first % 32 + kLanes<Acc> > 32) bits |= uint64_t(words[first / 32 + 1]) << 32;
        store_raw(row + j, where_bits<Acc>(uint32_t(bits >> (first % 32)), load_raw<Vector<Acc>>(row + j)));
      }
      for (; j < columns; ++j) row[j] = (words[(j0 + j) / 32] >> ((j0 + j) % 32)) & 1 ? row[j] : Acc(0);
    } else if (job.kept_where) {
      const int64_t offset = (i0 + i) * job.columns + j0;
      if (job.kept_where_size == 2) zero_where_zero<uint16_t>(row, job.kept_where, offset, columns);
      if (job.kept_where_size == 4) zero_where_zero<uint32_t>(row, job.kept_where, offset, columns);
      if (job.kept_where_size == 8) zero_where_zero<uint64_t>(row, job.kept_where, offset, columns);
    }
    for (j = columns; j < width; ++j) row[j] = Acc(0);
  }
  for (int64_t i = rows; i < height; ++i) std::memset(buffer + i * width, 0, size_t(width) * sizeof(Acc));
}

// out[m, 0..16) += sum_d S(m, d) factor[d, 0..16) for kThinRows m's; S(m, d) = block[m * step_m + d * step_d].
template <bool Pairs, typename Acc>
inline void thin_tile(const Acc* block, int64_t step_m, int64_t step_d, int64_t depth, const Acc* factor, int64_t width,
                      Acc* out, int64_t valid) {
  constexpr int V = kThinVectors<Acc>, M = kThinRows<Acc>;
  Vector<Acc> sum[M][V];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[m][v] = Vector<Acc>{};
  for (int64_t d = 0; d < depth; ++d) {
    Vector<Acc> f[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) f[v] = load_raw<Vector<Acc>>(factor + d * width + v * kLanes<Acc>);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const Vector<Acc> s = splat(block[m * step_m + d * step_d]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        if constexpr (Pairs)
          sum[m][v] = multiply_add_pairs(s, f[v], sum[m][v]);
        else
          sum[m][v] += s * f[v];
      }
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m)
    if (m < valid)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        Acc* o = out + m * width + v * kLanes<Acc>;
        store_raw(o, load_raw<Vector<Acc>>(o) + sum[m][v]);
      }
}

template <bool Pairs, typename Acc, typename T>
void contract_rows(const lors::cpu::ContractJob& job, int64_t begin, int64_t end) {
  alignas(64) Acc buffer[kRowsBlockI * kRowsBlockJ];
  const auto* factor = static_cast<const Acc*>(job.factor);
  auto* out = static_cast<Acc*>(job.out);
  std::memset(out + begin * job.width, 0, size_t((end - begin) * job.width) * sizeof(Acc));
  for (int64_t i = begin; i < end; i += kRowsBlockI) {
    const int64_t rows = end - i < kRowsBlockI ? end - i : kRowsBlockI;
    for (int64_t j = 0; j < job.columns; j += kRowsBlockJ) {
      const int64_t columns = job.columns - j < kRowsBlockJ ? job.columns - j : kRowsBlockJ;
      load_block<Acc, T>(job, i, rows, kRowsBlockI, j, columns, kRowsBlockJ, buffer);
      for (int64_t p = 0; p < job.width; p += lors::cpu::kThinWidth)
        for (int64_t m = 0; m < rows; m += kThinRows<Acc>)
          thin_tile<Pairs>(buffer + m * kRowsBlockJ, kRowsBlockJ, 1, columns, factor + j * job.width + p, job.width,
                           out + (i + m) * job.width + p, rows - m);
    }
  }
}

template <typename Acc, typename T>
void contract_columns(const lors::cpu::ContractJob& job, int64_t begin, int64_t end) {
  alignas(64) Acc buffer[kColumnsBlockI * kColumnsBlockJ];
  const auto* factor = static_cast<const Acc*>(job.factor);
  auto* out = static_cast<Acc*>(job.out);
  std::memset(out + begin * job.width, 0, size_t((end - begin) * job.width) * sizeof(Acc));
  for (int64_t j = begin; j < end; j += kColumnsBlockJ) {
    const int64_t columns = end - j < kColumnsBlockJ ? end - j : kColumnsBlockJ;
    for (int64_t i = 0; i < job.rows; i += kColumnsBlockI) {
      const int64_t rows = job.rows - i < kColumnsBlockI ? job.rows - i : kColumnsBlockI;
      load_block<Acc, T>(job, i, rows, rows, j, columns, kColumnsBlockJ, buffer);
      for (int64_t p = 0; p < job.width; p += lors::cpu::kThinWidth)
        for (int64_t m = 0; m < columns; m += kThinRows<Acc>)
          thin_tile<false>(buffer + m, 1, kColumnsBlockJ, rows, factor + i * job.width + p, job.width,
                           out + (j + m) * job.width + p, columns - m);
    }
  }
}

void contract_rows(const lors::cpu::ContractJob& job, int64_t begin, int64_t end) {
  if constexpr (kHasPairs)
    if (job.pairs) return contract_rows<true, float, float>(job, begin, end);
  with_type(job.matrix_dtype, [&](auto t) {
    using T = decltype(t);
    if (job.is_double) return contract_rows<false, double, T>(job, begin, end);
    contract_rows<false, float, T>(job, begin, end);
  });
}

void contract_columns(const lors::cpu::ContractJob& job, int64_t begin, int64_t end) {
  with_type(job.matrix_dtype, [&](auto t) {
    using T = decltype(t);
    if (job.is_double) return contract_columns<double, T>(job, begin, end);
    contract_columns<float, T>(job, begin, end);
  });
}

}  // namespace
