// SPDX-License-Identifier: Apache-2.0
// A frozen weight whose stored values are codes q on a grid, with a scale s and a zero point z for each group of columns:
//   dequantised   w  = (q - z) s                          q - z is exact, the product is rounded once, to float32
//   requantised   v  = w + scaling B A,   inv = float32(1 / (steps s))
//                 q' = clamp(rint(fma(v, inv, u)) + z', lo, hi),   z' = z / steps            int8, int4; rint: to nearest even
//                 q' = e4m3(v inv), saturating, -0 as +0                                     e4m3, which has no z and no u
//                 merged = (q' - z') (steps s), rounded once more where the result is of 16 bits
// and +0 off the mask. u is the dither: a fixed number in [-0.499, 0.499] for every place, so that updates below half a step
// are not all lost; 0 without one (random_dither in random.h; the row of its key is first_row + n). What is stored comes back
// from it unchanged. Where v is infinite or NaN, merged is NaN on every grid: clamping must not hide it. steps = 1: to the grid
// of the stored codes; 16: the stored codes are int8 on a grid sixteen times finer than the int4 grid that the result lies on
// (z is a multiple of 16). The gradients pass straight through, as in SQFT (arXiv 2410.03750).
//
// Codes lie where values lie (types.h, sparse24.h), 8 bits each; int4: two in a byte, the first in the low half, as two's
// complement. A row begins with a whole byte: row_offsets of a bitmap count codes, and each row's number of them is even.
// Slots that hold no weight are code 0. Every weight has its mask: a dense one has bits.
#pragma once

#include <cstdint>

#include <lors/types.h>

namespace lors {

enum class Grid : uint8_t { none, int8, int4, e4m3 };

struct Quantization {
  Grid grid = Grid::none;               // none: the weight holds values, and nothing else here is read
  int64_t group = 0;                    // columns that share a scale: 32, 64, 128 or in_features, which it divides
  const void* scales = nullptr;         // [N, K / group], positive and finite
  DType scales_dtype = DType::float32;  // float32, bfloat16 or float16
  const int8_t* zero_points = nullptr;  // [N, K / group]; null: 0; e4m3: null
  int64_t requantize_steps = 0;         // 0: the merged weight is not requantised; 1 or 16: `steps`
  int64_t dither_seed = -1;             // below 0: no dither
  int64_t first_row = 0;                // of the whole weight, where the call is given some of its rows: the dither's rows
};

}  // namespace lors
