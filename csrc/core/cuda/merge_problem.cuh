// SPDX-License-Identifier: Apache-2.0
// What every kernel of the merge is given, and the index of a compressed weight in shared memory.
#pragma once

#include <lors/quantization.h>
#include <lors/random.h>
#include <lors/status.h>

#include "experts.cuh"
#include "merge_config.h"

namespace lors::cuda {

struct MergeProblem {
  const void* weight;          // the stored values, of the kernel's type W, or codes: merge.h
  const uint8_t* index;        // dense, bitmap: mask bits, 1 = kept; dense: null: kept where weight != 0; 2:4: metadata
  int64_t index_pitch;         // bytes of a row of `index`
  const int64_t* row_offsets;  // bitmap: [N + 1]
  const uint32_t* before;      // bitmap: [N, column_blocks], the values of the row before each block's columns
  Matrix lora_A;               // [r, K]
  Matrix lora_B;               // [N, r]
  void* merged;                // [N, K] row-major, of the kernel's type Out; 2:4 values: [N, K/2]
  int64_t out_features;        // N
  int64_t in_features;         // K
  float scaling;
  bool weight_vectors, merged_vectors, index_vectors;  // every row allows vector accesses (has_vectors)
  int rows, panel_rows, chunk, tile_at, tile_pitch;    // merge_config.h
  int64_t column_blocks;
  Draws draws;
  Layout layout;  // of the weight: read where it is quantised, the kernels of values know it
  Quantization quantization;
};

// Of MergeArgs or FusedLinearArgs, but for the result, `before` and the draws.
template <typename Args>
MergeProblem merge_problem(const Args& a, const MergeConfig& c) {
  const bool sparse24 = a.weight_layout == Layout::sparse24;
  MergeProblem p{};
  p.weight = a.weight;
  p.index = sparse24 ? a.metadata : reinterpret_cast<const uint8_t*>(a.mask);
  p.index_pitch = sparse24 ? sparse24_metadata_bytes(a.in_features) : 4 * mask_words(a.in_features);
  p.row_offsets = a.row_offsets;
  p.lora_A = matrix(a.lora_A, a.lora_A_dtype, a.r, a.in_features);
  p.lora_B = matrix(a.lora_B, a.lora_B_dtype, a.out_features, a.r);
  p.out_features = a.out_features;
  p.in_features = a.in_features;
  p.scaling = a.r > 0 ? static_cast<float>(a.scaling) : 0.f;  // no sign and no NaN of it where nothing is added
  p.weight_vectors = has_vectors(a.weight, a.in_features);
  p.index_vectors = p.index_pitch % 16 == 0 && reinterpret_cast<uintptr_t>(p.index) % 16 == 0;
  p.rows = c.rows;
  p.panel_rows = c.panel_rows;
  p.chunk = c.chunk;
  p.tile_at = c.tile_at;
  p.tile_pitch = merge_tile_pitch(c.columns);
  p.column_blocks = c.column_blocks;
  p.layout = a.weight_layout;
  p.quantization = a.quantization;
  return p;
}

// The problem of one expert, whose rows follow those of the one before; of values, not of codes.
__device__ __forceinline__ MergeProblem of_expert(MergeProblem p, int expert, int value_bytes) {
  const int64_t row = expert * p.out_features;
  if (p.layout != Layout::bitmap)
    p.weight = static_cast<const uint8_t*>(p.weight) + row * p.in_features * value_bytes / (p.layout == Layout::dense ? 1 : 2);
  if (p.index) p.index += row * p.index_pitch;
  if (p.row_offsets) p.row_offsets += row;
  if (p.before) p.before += row * p.column_blocks;
  p.lora_A = of_expert(p.lora_A, expert);
  p.lora_B = of_expert(p.lora_B, expert);
  return p;
}

// Sets p.before to the counts of a bitmap, for blocks of `columns`, which it queues into `scratch` [experts N, column_blocks]
// (merge.cu); not of experts without rows.
Status count_before(MergeProblem& p, void* scratch, int columns, const CudaHost& host, const ExpertRows& experts = {});

// The panel's part of `index` in shared memory: a word of bits, or of codes, for each 32 columns.
struct IndexTile {
  int pitch;
  uint32_t* words;  // [panel_rows, pitch]

  explicit __device__ __forceinline__ IndexTile(const MergeProblem& p)
      : pitch(p.tile_pitch), words(reinterpret_cast<uint32_t*>(ptx::dynamic_shared() + p.tile_at)) {}

  __device__ __forceinline__ void stage(const MergeProblem& p, int64_t panel_row, int64_t first_column) const {
    const int quads = pitch / 4 - 1;  // of words in a row; the last four are the pad
    for (int task = threadIdx.x; task < p.panel_rows * quads; task += blockDim.x) {
      // Eight neighbouring lanes take eight rows, which lie in different banks.
      const int i = task / (8 * quads) * 8 + task % 8, quad = task / 8 % quads;
      const int64_t n = panel_row + i, byte = first_column / 8 + 16 * quad;
      const uint8_t* const from = p.index + n * p.index_pitch + byte;
      const int64_t left = n < p.out_features ? p.index_pitch - byte : 0;
      uint32_t word[4] = {};
      if (p.index_vectors && left >= 16) {
        const uint4 v = ptx::load_global_once(reinterpret_cast<const uint4*>(from));
        word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
      } else {
#pragma unroll
        for (int b = 0; b < 16; ++b)
          if (b < left) word[b / 4] |= static_cast<uint32_t>(ptx::load_global(from + b)) << (8 * (b % 4));
      }
      ptx::store_shared(reinterpret_cast<uint4*>(words + i * pitch + 4 * quad), make_uint4(word[0], word[1], word[2], word[3]));
    }
  }
  // before[i, word] = `count` and the bits of row i of the panel before that word; returns the same of the row's end. The row's
  // words have to be in shared memory.
  __device__ __forceinline__ uint32_t count_before(uint32_t* before, int i, uint32_t count) const {
    for (int quad = 0; quad < pitch / 4 - 1; ++quad) {
      const uint4 v = ptx::load_shared(reinterpret_cast<const uint4*>(words + i * pitch) + quad);
      uint4 sums = make_uint4(count, count + __popc(v.x), 0, 0);
      sums.z = sums.y + __popc(v.y);
      sums.w = sums.z + __popc(v.z);
      count = sums.w + __popc(v.w);
      ptx::store_shared(reinterpret_cast<uint4*>(before + i * pitch) + quad, sums);
    }
    return count;
  }
};

}  // namespace lors::cuda
