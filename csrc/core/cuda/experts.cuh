// SPDX-License-Identifier: Apache-2.0
// Rows of an activation that belong to experts (a mixture of experts): expert e has the rows [offsets[e - 1], offsets[e]) and a
// weight and an adapter of its own; rows from the last offset on have none. The offsets stay on the device: a launch has as
// many tiles of rows as there may be (expert_tiles), and each block finds its own. For every family.
#pragma once

#include <lors/status.h>
#include <lors/types.h>

#include <string>

#include "operands.cuh"

namespace lors::cuda {

// Of a call with `rows` rows.
inline Status check_experts(const char* name, const Experts& experts, int64_t rows) {
  constexpr int64_t kMost = 0x7fffffff;
  if (rows <= kMost && experts.count >= 1 && experts.count < kMost && (experts.offsets || experts.count == 1)) return {};
  return Status::error(std::string(name) + " takes up to " + std::to_string(kMost) +
                       " rows of one weight, or of several experts with their offsets, and was given " +
                       std::to_string(experts.count) + " experts and " + std::to_string(rows) + " rows " +
                       (experts.offsets ? "with" : "without") + " offsets.");
}

struct ExpertRows {
  const int32_t *offsets = nullptr, *gather = nullptr;  // as in Experts
  int count = 1;
  bool first = true, last = true;

  // The end of an expert's rows, of `rows` in all; what is not ascending, or beyond them, does not lead outside of them.
  __device__ __forceinline__ int end(int expert, int rows) const {
    if (expert >= count && !last) expert = count - 1;
    const int end = expert < count ? ptx::load_global(offsets + expert) : rows;
    return end < 0 ? 0 : end < rows ? end : rows;
  }
  __device__ __forceinline__ int begin(int expert, int rows) const { return expert > 0 || !first ? end(expert - 1, rows) : 0; }
};

inline ExpertRows expert_rows(const Experts& of) {
  return {of.offsets, of.gather, static_cast<int>(of.count), of.first, of.last};
}

// Where row i of an activation is in memory.
__device__ __forceinline__ int64_t gathered(const int32_t* gather, int64_t i) {
  return gather ? ptx::load_global(gather + i) : i;
}

// Some rows of one expert.
struct ExpertTile {
  int expert;  // the number of experts: rows beyond the last offset
  int first;   // row, of up to 2^31 (check_experts)
  int rows;    // 0: there is no such tile
};

// Tile `index` of at most `size` rows, of those of all experts one after another and then those beyond the last offset; by
// whole warps.
__device__ __forceinline__ ExpertTile expert_tile(const ExpertRows& experts, int64_t rows, int size, unsigned index) {
  const int all = static_cast<int>(rows);
  if (experts.offsets == nullptr) {
    const int first = static_cast<int>(index) * size, left = all - first;
    return {0, first, left < size ? left : size};
  }
  const int lane = threadIdx.x % kWarp;
  int begin_of_lanes = experts.begin(0, all);
  unsigned before = 0;  // tiles of the experts before those of the lanes
#pragma unroll 1
  for (int expert = lane; expert - lane <= experts.count; expert += kWarp) {
    const int end = experts.end(expert, all);
    int begin = __shfl_up_sync(0xffffffffu, end, 1);
    if (lane == 0) begin = begin_of_lanes;
    const unsigned tiles = end > begin ? static_cast<unsigned>((end - begin - 1) / size + 1) : 0;
    unsigned sum = tiles;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const unsigned left = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += left;
    }
    const unsigned beyond = __ballot_sync(0xffffffffu, before + sum > index);
    if (beyond != 0) {
      const int found = __ffs(static_cast<int>(beyond)) - 1;
      const int first = begin + static_cast<int>(index - (before + sum - tiles)) * size;
      const int left = end - first;
      return {__shfl_sync(0xffffffffu, expert, found), __shfl_sync(0xffffffffu, first, found),
              __shfl_sync(0xffffffffu, left < size ? left : size, found)};
    }
    begin_of_lanes = __shfl_sync(0xffffffffu, end, kWarp - 1);
    before += __shfl_sync(0xffffffffu, sum, kWarp - 1);
  }
  return {experts.count, 0, 0};
}

// The expert of one row: the number of ends up to it; -1 where the row is not the call's.
__device__ __forceinline__ int expert_of(const ExpertRows& experts, int64_t row) {
  if (experts.offsets == nullptr) return 0;
  int low = 0, high = experts.count;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (ptx::load_global(experts.offsets + middle) <= row)
      low = middle + 1;
    else
      high = middle;
  }
  const bool before = !experts.first && row < ptx::load_global(experts.offsets - 1);
  return before || (low == experts.count && !experts.last) ? -1 : low;
}

// The same matrix of another expert, which lies `expert` matrices further.
__device__ __forceinline__ Matrix of_expert(Matrix m, int expert) {
  m.data = static_cast<const uint8_t*>(m.data) + expert * m.rows * m.columns * (m.dtype == DType::float32 ? 4 : 2);
  return m;
}

}  // namespace lors::cuda
