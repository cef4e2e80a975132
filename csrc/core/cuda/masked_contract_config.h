// SPDX-License-Identifier: Apache-2.0
// The tiling of masked_contract, a pure function of the problem and the device. A block has a tile of G, 128 x 128. It writes
// fp32 partial sums: of lora_B_grad one per column tile, of lora_A_sum one per row tile. And the panels of G that a caller makes.
#pragma once

#include <lors/cuda_device.h>
#include <lors/types.h>

namespace lors::cuda {

constexpr int kContractRows = 128, kContractColumns = 128;  // of G, per block
constexpr int kContractThreads = 256;                       // 2 warps down the rows, 4 across the columns
constexpr int kContractRanks = 16;                          // in a chunk
constexpr int kContractPad = 8;           // 16 bytes after each row in shared memory, against bank conflicts of ldmatrix
constexpr int kContractGradientTerms = 3;  // of the masked G, which is fp32
// Bound on the partial sums of one launch, per multiprocessor (132 MiB on an H100), exceeded only by a single row of tiles.
constexpr int64_t kContractPartialBytes = int64_t{1} << 20;

// Offsets into shared memory, in bytes. The terms of G for the transposed contraction and the sums of the warps use the same
// memory one after the other, from 0 on.
struct ContractShared {
  int sums_A = 0;  // [2, columns, kContractRanks] fp32, over the terms
  int sums_B = 0;  // [4, kContractRows, kContractRanks] fp32
  int lora_A = 0;  // [terms, kContractRanks, columns + pad] 16-bit
  int lora_B = 0;  // [terms, kContractRows, kContractRanks + pad] 16-bit
  int kept = 0;    // [kContractRows, columns / 32] words of bits
  int total = 0;
};

constexpr ContractShared contract_shared(int terms_A, int terms_B) {
  ContractShared s;
  s.sums_B = 2 * kContractThreads / 32 * kContractGradientTerms * 16 * (kContractColumns / 4 + kContractPad);
  s.lora_A = s.sums_B + 4 * 4 * kContractRows * kContractRanks;
  s.lora_B = s.lora_A + 2 * terms_A * kContractRanks * (kContractColumns + kContractPad);
  s.kept = s.lora_B + 2 * terms_B * kContractRows * (kContractRanks + kContractPad);
  s.total = s.kept + 4 * kContractRows * kContractColumns / 32;
  return s;
}

struct ContractConfig {
  int64_t row_tiles = 0, column_tiles = 0;
  int64_t width = 0;        // r rounded up to a multiple of 4: the pitch of the partial sums
  int64_t panel_tiles = 0;  // rows of tiles in one launch

  constexpr int64_t panel_rows() const { return panel_tiles * kContractRows; }
};

constexpr int64_t contract_parts(int64_t size, int64_t part) { return (size + part - 1) / part; }

constexpr ContractConfig contract_config(int64_t rows, int64_t columns, int64_t r, bool want_A, bool want_B,
                                         DeviceLimits limits) {
  ContractConfig c;
  c.row_tiles = contract_parts(rows, kContractRows);
  c.column_tiles = contract_parts(columns, kContractColumns);
  c.width = contract_parts(r, 4) * 4;
  const int64_t row_bytes = 4 * c.width * ((want_B ? c.column_tiles * kContractRows : 0) + (want_A ? columns : 0));
  const int64_t fit = (limits.multiprocessors > 0 ? limits.multiprocessors : 1) * kContractPartialBytes / row_bytes;
  const int64_t panels = contract_parts(c.row_tiles, fit < 1 ? 1 : fit);
  c.panel_tiles = contract_parts(c.row_tiles, panels);  // panels of one size
  return c;
}

// Rows of a panel of a float32 G [N, K] that a matmul writes and masked_contract reads: half of the L2 cache, so that it is
// still there, beside what the matmul reads. Whole tiles, in panels of one size.
constexpr int64_t gradient_panel_rows(int64_t N, int64_t K, int64_t l2_bytes) {
  const int64_t fit = l2_bytes / 2 / (4 * K), tiles = fit / kContractRows;
  if (tiles == 0) return fit < 1 ? 1 : fit < N ? fit : N;
  const int64_t panels = contract_parts(N, tiles * kContractRows);
  const int64_t rows = contract_parts(contract_parts(N, panels), kContractRows) * kContractRows;
  return rows < N ? rows : N;
}

}  // namespace lors::cuda
