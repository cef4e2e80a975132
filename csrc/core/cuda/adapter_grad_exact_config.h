// SPDX-License-Identifier: Apache-2.0
// The tiling of the exact gradients, a pure function of the problem and the device. A block computes a tile of G = dY^T X,
// 128 rows x 128 or 256 columns, over all tokens or, where there are few tiles, over one range of them. It writes fp32 partial
// sums: of lora_B_grad one per column tile and range, of lora_A_grad one per row tile and range.
#pragma once

#include <lors/cuda_device.h>
#include <lors/types.h>

namespace lors::cuda {

constexpr int kExactRows = 128;         // of G, per block
constexpr int kExactThreads = 256;      // 2 warps down the rows, 4 across the columns
constexpr int kExactRanks = 16;         // in a chunk
constexpr int kExactPad = 8;            // 16 bytes after each row in shared memory, against bank conflicts of ldmatrix
constexpr int kExactWide = 256;         // columns of the tile for 16-bit dY and X, where it fits and there are many
constexpr int kExactNarrow = 128;       // columns of every other tile
constexpr int kExactGradientTerms = 3;  // of the masked G, which is fp32
// Bound on the partial sums of one launch, per multiprocessor (132 MiB on an H100), exceeded only by a single row of tiles.
constexpr int64_t kExactPartialBytes = int64_t{1} << 20;

// Tokens of one step of the matmul, and the number of stages (steps in shared memory or in flight). terms: of dY and X.
constexpr int exact_step(int terms) { return terms == 3 ? 16 : 32; }
constexpr int exact_stages(int terms, int columns) { return terms == 3 ? 2 : columns == kExactWide ? 4 : 3; }

// Words from row to row of the mask's tile: the same word of eight rows lies in eight different banks.
constexpr int exact_kept_pitch(int columns) { return columns == kExactWide ? 12 : columns / 32; }

// Offsets into shared memory, in bytes. The stages of the matmul, the terms of G for the transposed contraction and the sums
// of the warps use the same memory one after the other, from 0 on.
struct ExactShared {
  int sums_A = 0;  // [2, columns, kExactRanks] fp32, over the terms
  int sums_B = 0;  // [4, kExactRows, kExactRanks] fp32
  int lora_A = 0;  // [terms, kExactRanks, columns + pad] 16-bit
  int lora_B = 0;  // [terms, kExactRows, kExactRanks + pad] 16-bit
  int kept = 0;    // [kExactRows, pitch] words of bits
  int total = 0;
};

// terms: of dY and X; 0: G is given.
constexpr ExactShared exact_shared(int columns, int terms, int terms_A, int terms_B) {
  ExactShared s;
  const int stages =
      terms == 0 ? 0 : 2 * exact_stages(terms, columns) * terms * exact_step(terms) * (kExactRows + columns + 2 * kExactPad);
  s.sums_B = 2 * kExactThreads / 32 * kExactGradientTerms * 16 * (columns / 4 + kExactPad);
  s.lora_A = s.sums_B + 4 * 4 * kExactRows * kExactRanks;
  if (stages > s.lora_A) s.lora_A = stages;
  s.lora_B = s.lora_A + 2 * terms_A * kExactRanks * (columns + kExactPad);
  s.kept = s.lora_B + 2 * terms_B * kExactRows * (kExactRanks + kExactPad);
  s.total = s.kept + 4 * kExactRows * exact_kept_pitch(columns);
  return s;
}

struct ExactShape {
  int64_t tokens = 0;
  int64_t rows = 0;     // of G: out_features
  int64_t columns = 0;  // of G: in_features
  int64_t r = 0;
  int terms = 0;  // of dY and X: 1 for a 16-bit dtype, which mma takes as it is, 3 for float32; 0: G is given
  int terms_A = 1, terms_B = 1;
  bool want_A = true, want_B = true;
};

struct ExactConfig {
  int columns = 0;  // of a tile. 0: nothing fits the device
  int64_t row_tiles = 0, column_tiles = 0;
  int64_t splits = 1;        // ranges of tokens
  int64_t range_tokens = 0;  // whole steps
  int64_t width = 0;         // r rounded up to a multiple of 4: the pitch of the partial sums
  int64_t panel_tiles = 0;   // rows of tiles in one launch
  int shared_bytes = 0;

  constexpr int64_t panel_rows() const { return panel_tiles * kExactRows; }
  constexpr int64_t partials_A() const { return splits * panel_tiles; }  // most of a launch
  constexpr int64_t partials_B() const { return splits * column_tiles; }
};

constexpr int64_t exact_parts(int64_t size, int64_t part) { return (size + part - 1) / part; }

// Cost model: time on the busiest SM, in units of 16 tokens x a 128 x 128 tile of G. The constants are guesses from instruction
// counts; nothing was measured.
constexpr ExactConfig exact_config(const ExactShape& s, DeviceLimits limits) {
  const int64_t processors = limits.multiprocessors > 0 ? limits.multiprocessors : 1;
  const int64_t ranks = exact_parts(s.r, kExactRanks), bound = processors * kExactPartialBytes;
  const int step = s.terms == 0 ? 1 : exact_step(s.terms);
  ExactConfig best;
  double best_cost = 0;
  for (const int columns : {kExactWide, kExactNarrow}) {
    if (columns == kExactWide && s.terms != 1) continue;
    ExactConfig c;
    c.columns = columns;
    c.shared_bytes = exact_shared(columns, s.terms, s.terms_A, s.terms_B).total;
    if (c.shared_bytes > limits.shared_bytes) continue;
    c.row_tiles = exact_parts(s.rows, kExactRows);
    c.column_tiles = exact_parts(s.columns, columns);
    c.width = exact_parts(s.r, 4) * 4;
    const int64_t steps = s.terms == 0 ? 1 : exact_parts(s.tokens, step);
    for (int64_t wanted = 1; wanted <= 8; ++wanted) {
      const int64_t range_steps = exact_parts(steps, wanted);
      if (wanted > 1 && range_steps * step < 256) break;  // the contractions would cost more than the matmul
      c.splits = exact_parts(steps, range_steps);
      c.range_tokens = range_steps * step;
      if (c.splits < wanted) continue;  // the same tiling as before
      const double matmul = static_cast<double>(c.range_tokens) / 16 * (s.terms == 3 ? 6.0 : columns == kExactWide ? 1.0 : 1.3);
      const double each = columns / kExactNarrow * (matmul + 16.0 * static_cast<double>(ranks) + 16.0);
      const double cost = static_cast<double>(exact_parts(c.row_tiles * c.column_tiles * c.splits, processors)) * each;
      const int64_t row_bytes =
          4 * c.width * c.splits * ((s.want_B ? c.column_tiles * kExactRows : 0) + (s.want_A ? s.columns : 0));
      if (c.splits > 1 && row_bytes * c.row_tiles > bound) break;
      const int64_t fit = row_bytes > 0 ? bound / row_bytes : c.row_tiles;
      const int64_t panels = exact_parts(c.row_tiles, fit < 1 ? 1 : fit);
      c.panel_tiles = panels > 0 ? exact_parts(c.row_tiles, panels) : 0;  // panels of one size
      if (best.columns == 0 || cost < best_cost) {
        best = c;
        best_cost = cost;
      }
    }
  }
  return best;
}

}  // namespace lors::cuda
