// SPDX-License-Identifier: Apache-2.0
// v = (q - z) s + scaling lora_B lora_A     merged = kept ? v, or, requantised, (q' - z') (steps s) : +0, rounded once
// The Source of merge.cuh for quantised codes q (lors/quantization.h), for what merge_fast.cuh does not take: one code at a
// time, layout and grid read at run time. quantized.cuh has the arithmetic of a code.
#pragma once

#include "merge_source.cuh"
#include "quantized.cuh"

namespace lors::cuda {

// W is uint8_t, whatever the codes are.
template <typename W, typename Out>
struct QuantizedSource : BitmapTile {
  static constexpr bool kSplit = kSplitColumns<W, Out>, kLate = false;

  using BitmapTile::BitmapTile;
  __device__ __forceinline__ void stage(const MergeProblem& p, int64_t panel_row, int64_t first_column) const {
    if (p.layout == Layout::bitmap)
      BitmapTile::stage(p, panel_row, first_column);
    else
      IndexTile::stage(p, panel_row, first_column);
  }
  __device__ __forceinline__ void fetch(const MergeProblem&, const Lane&) const {}
  __device__ __forceinline__ uint32_t expand(const MergeProblem& p, const Lane& at, int h, int c, float (&values)[8]) const {
    const Quantization& q = p.quantization;
    const int row = at.row + 8 * h, place = row * pitch + at.word + c;
    const uint32_t word = ptx::load_shared(words + place);
    const int64_t block = at.column + 32 * c;
    const CodeGroup group = block < p.in_features ? load_group(p, at, h, c) : CodeGroup{};
    uint32_t kept = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int first = 4 * (kSplit ? at.q + 4 * half : 2 * at.q + half);  // of 32 columns
      const uint32_t four = word >> first & 15;
      int64_t begin;  // number of the first code of these four columns
      uint32_t position[2], keeps = four;
      if (p.layout == Layout::sparse24) {
        begin = at.n(h) * (p.in_features / 2) + (block + first) / 2;
        slots_of(four, position);
        keeps = block + first < p.in_features ? kept_by(four) : 0;  // zeros behind the row's metadata would keep a column
      } else if (p.layout == Layout::bitmap) {
        begin = ptx::load_shared(this->begin + row) + ptx::load_shared(before + place) + __popc(word & ((1u << first) - 1));
      } else {
        begin = at.n(h) * (q.grid == Grid::int4 ? (p.in_features + 1) / 2 * 2 : p.in_features) + block + first;
      }
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        int64_t code = begin + i;
        if (p.layout == Layout::sparse24) code = begin + (position[0] != i);
        if (p.layout == Layout::bitmap) code = begin + __popc(four & ((1u << i) - 1));
        values[4 * half + i] = keeps >> i & 1 ? __fmul_rn(load_code(p, code) - group.zero, group.scale) : 0.f;
      }
      kept |= keeps << (4 * half);
    }
    return kept;
  }
  __device__ __forceinline__ void requantize(const MergeProblem& p, const Lane& at, int h, int c, uint32_t kept,
                                             float (&values)[8]) const {
    const Quantization& q = p.quantization;
    if (q.requantize_steps == 0 || at.column + 32 * c >= p.in_features) return;
    const CodeGroup group = load_group(p, at, h, c);
    const Requantized onto(q, group.scale, Requantized::zero_of(q, group.zero), Requantized::inverse_of(q, group.scale),
                           q.grid == Grid::e4m3);
    const RandomRow row = random_row(static_cast<uint64_t>(q.dither_seed), q.first_row + at.n(h));
    const uint32_t first = static_cast<uint32_t>(lane_column<kSplit>(at, c));
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) {
      const uint32_t column = first + (kSplit ? i % 4 + i / 4 * 16 : i);
      const float u = q.dither_seed < 0 || onto.e4m3 ? 0.f : dither(row, column);
      values[i] = kept >> i & 1 ? onto(values[i], u) : 0.f;
    }
  }

 private:
  // The group of the lane's columns c: it has 32 columns, a multiple of them, or all.
  static __device__ __forceinline__ CodeGroup load_group(const MergeProblem& p, const Lane& at, int h, int c) {
    const unsigned group = static_cast<unsigned>(p.quantization.group), columns = static_cast<unsigned>(p.in_features);
    return CodeGroup::load(p.quantization, at.n(h) * (columns / group) + static_cast<unsigned>(at.column + 32 * c) / group);
  }
  static __device__ __forceinline__ float load_code(const MergeProblem& p, int64_t i) {
    const auto* const codes = static_cast<const uint8_t*>(p.weight);
    if (p.quantization.grid != Grid::int4) return code_value(p.quantization.grid, ptx::load_global(codes + i));
    return code_value(Grid::int4, ptx::load_global(codes + i / 2) >> (4 * (i % 2)) & 15u);
  }
};

}  // namespace lors::cuda
