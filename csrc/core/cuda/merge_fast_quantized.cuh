// SPDX-License-Identifier: Apache-2.0
// v = (q - z) s + scaling lora_B lora_A     merged = kept ? v, or, requantised, (q' - z') (steps s) : +0, rounded once to T
// The Sources of merge_fast.cuh for quantised codes q (lors/quantization.h), with the same bits as merge_quantized.cuh. A
// kernel for each case would be too many: what a kernel reads at run time is whether codes are int8 or int4, the layout dense
// or bitmap, the result requantised, and dithered.
#pragma once

#include "merge_fast_source.cuh"
#include "quantized.cuh"

namespace lors::cuda {

// What the Sources below have in common. kFloat: codes are e4m3; else int8 or int4.
template <typename T, typename Lanes, bool kFloat>
struct FastCodes : FastCopies<Lanes> {
  using Merged = uint4;
  static constexpr bool kReadsCodes = true;
  const MergeProblem& p;
  bool is_int4;
  int group_shift;  // log2 of a group's columns; 31: a whole row
  int group_pitch;
  float4* groups;   // [panel_rows, group_pitch]: a group's scale; what `two_of` subtracts from its codes; and, if requantised,
                    // 1 / (steps scale) and the result's zero point
  RandomRow* keys;  // [panel_rows]: the keys of the dither
  int64_t block_column;
  int at;           // the step's first row of the panel
  int lane_column;  // of the block, the lane's first

  __device__ __forceinline__ FastCodes(const MergeProblem& problem, int columns, int64_t, int64_t, int step)
      : FastCopies<Lanes>(problem, step, problem.layout == Layout::bitmap, bits_shift(problem), threads_shift(problem, columns),
                          fast_row_pitch(problem.layout, problem.quantization.grid, columns)),
        p(problem) {
    const Quantization& q = p.quantization;
    is_int4 = this->value_shift == 2;
    group_shift = q.group == 32 ? 5 : q.group == 64 ? 6 : q.group == 128 ? 7 : 31;
    group_pitch = fast_group_pitch(columns, q.group);
    groups = reinterpret_cast<float4*>(this->fetched + 2 * step * this->row_pitch);
    keys = reinterpret_cast<RandomRow*>(groups + p.panel_rows * group_pitch);
    this->row_bytes = fast_code_bytes(p.layout, q.grid, p.in_features);
  }

  __device__ __forceinline__ void stage(const MergeProblem&, int64_t row, int64_t column, int rows) {
    const Quantization& q = p.quantization;
    const int64_t left = p.in_features - column;
    const int columns = 32 * (this->pitch - 4), groups_across = fast_groups(columns, q.group);
    block_column = column;
    this->first_byte = row * this->row_bytes + fast_code_bytes(p.layout, q.grid, column);
    this->block_bytes = fast_code_bytes(p.layout, q.grid, left < columns ? left : columns);
    const int64_t in_row = static_cast<unsigned>(p.in_features) / static_cast<unsigned>(q.group);
    for (int task = threadIdx.x; task < p.panel_rows * groups_across; task += Lanes::kThreads) {
      const int i = task / groups_across, j = task % groups_across;
      const int64_t first = column + (int64_t{j} << group_shift);
      float4 entry{};
      if (i < rows && first < p.in_features) {
        const CodeGroup group = CodeGroup::load(q, (row + i) * in_row + (first >> group_shift));
        entry.x = group.scale;
        entry.y = kCodeBase + (is_int4 ? 8.f : 128.f) + group.zero;
        if (q.requantize_steps != 0) {
          entry.z = Requantized::inverse_of(q, group.scale);
          entry.w = Requantized::zero_of(q, group.zero);
        }
      }
      ptx::store_shared(groups + i * group_pitch + j, entry);
    }
    if (q.dither_seed >= 0)
      for (int i = threadIdx.x; i < p.panel_rows; i += Lanes::kThreads)
        ptx::store_shared(keys + i, random_row(static_cast<uint64_t>(q.dither_seed), q.first_row + row + i));
    FastCopies<Lanes>::stage(p, row, column, rows);
  }
  __device__ __forceinline__ void start(int row, int column, int rows) {
    FastCopies<Lanes>::start(row, column, rows);
    lane_column = column + 8 * Lanes::eight();
  }
  __device__ __forceinline__ void step(const MergeProblem&, int row, int rows) {
    FastCopies<Lanes>::step(p, row, rows);
    at = row;
  }

 protected:
  // Of the lane's eight weights h, c: the first column, counted from the block's first; the row of the panel; the group.
  __device__ __forceinline__ int column_of(int c) const { return lane_column + (Lanes::kTransposed ? 0 : 32 * c); }
  __device__ __forceinline__ int panel_row(int h, int c) const { return at + this->lane_row + Lanes::below(h, c); }
  __device__ __forceinline__ float4 group_of(int h, int c) const {
    return ptx::load_shared(groups + panel_row(h, c) * group_pitch + (column_of(c) >> group_shift));
  }
  // Four codes, a byte each, from four bytes or four nibbles. 8 or 128 is added to integers, so that none is negative.
  __device__ __forceinline__ uint32_t bytes_from(uint32_t codes) const {
    if (kFloat) return codes;
    if (!is_int4) return codes ^ 0x80808080u;
    codes ^= 0x8888u;
    return ptx::pick_bytes(codes & 0x0f0fu, codes >> 4 & 0x0f0fu, 0x5140);
  }
  // (q - z) s of bytes 2 i and 2 i + 1. As the last byte of kCodeBase, an integer makes the float32 kCodeBase + integer.
  __device__ __forceinline__ float2 two_of(uint32_t bytes, int i, const float4& group) const {
    float2 two;
    if constexpr (kFloat) {
      two = ptx::e4m3_values(bytes >> (16 * i));
    } else {
      two.x = __uint_as_float(ptx::pick_bytes(bytes, kCodeBaseBits, 0x7650 | 2 * i)) - group.y;
      two.y = __uint_as_float(ptx::pick_bytes(bytes, kCodeBaseBits, 0x7651 | 2 * i)) - group.y;
    }
    return make_float2(__fmul_rn(two.x, group.x), __fmul_rn(two.y, group.x));
  }
  // Puts merged values on the grid, if the launch asks for it. They are among the first or second four (half) of the lane's
  // eight h, c; column(i): which of the four value i is.
  template <int kCount, typename Column>
  __device__ __forceinline__ void requantize(float (&values)[kCount], int h, int c, int half, const float4& group,
                                             const Column& column) const {
    const Quantization& q = p.quantization;
    if (q.requantize_steps == 0) return;
    const Requantized onto(q, group.x, group.w, group.z, kFloat);
    if (!kFloat && q.dither_seed >= 0) {
      const RandomRow key = ptx::load_shared(keys + panel_row(h, c));
      const uint32_t first = static_cast<uint32_t>(block_column) + column_of(c) + 4 * half;
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = onto(values[i], dither(key, first + column(i)));
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = onto(values[i], 0.f);
    }
  }

 private:
  // log2 of the bits of a code.
  static __device__ __forceinline__ int bits_shift(const MergeProblem& p) {
    return !kFloat && p.quantization.grid == Grid::int4 ? 2 : 3;
  }
  // log2 of how many threads copy a row, one for each 16 bytes. Of a bitmap half of the weights are taken to be kept.
  static __device__ __forceinline__ int threads_shift(const MergeProblem& p, int columns) {
    return (columns == 512 ? 5 : 4) - (3 - bits_shift(p)) - (p.layout != Layout::dense);
  }
};

// From 2:4. Both slots of a group of four columns are merged, then moved to their columns.
template <typename T, typename Lanes, bool kFloat>
struct FastCodeGroups : FastCodes<T, Lanes, kFloat> {
  __device__ __forceinline__ FastCodeGroups(const MergeProblem& p, int columns, int64_t row, int64_t column, int step)
      : FastCodes<T, Lanes, kFloat>(p, columns, row, column, step) {
    if (threadIdx.x < 16) this->set_table(0, threadIdx.x, placed_slots(threadIdx.x));
  }
  __device__ __forceinline__ uint2 merged(int h, int c, int half, const float (&sum)[4], float scaling) const {
    const uint32_t code = this->bits(h, c) >> (4 * half);
    const uint2 places = this->look_up(0, code);
    // All four slots of the lane's eight columns, of which `half` are two.
    const uint8_t* const row = this->row_of(h, c);
    const int first = this->column_of(c) / 2;
    const uint32_t slots = this->is_int4 ? ptx::load_shared(reinterpret_cast<const uint16_t*>(row + first / 2))
                                         : ptx::load_shared(reinterpret_cast<const uint32_t*>(row + first));
    const float4 group = this->group_of(h, c);
    const float2 weights = this->two_of(this->bytes_from(slots), half, group), sums = slot_sums(code, sum);
    float values[2] = {fmaf(scaling, sums.x, weights.x), fmaf(scaling, sums.y, weights.y)};
    const uint32_t position[2] = {code & 16 ? 2u : code >> 3 & 1, code & 64 ? 2 + (code >> 5 & 1) : 1u};
    this->requantize(values, h, c, half, group, [&](int i) { return position[i]; });
    const uint32_t pair = rounded_pair<T>(values[0], values[1]);
    return make_uint2(ptx::pick_bytes(pair, 0, places.x), ptx::pick_bytes(pair, 0, places.y));
  }
};

// From dense with a mask, and from a bitmap.
template <typename T, typename Lanes, bool kFloat>
struct FastCodeBits : FastCodes<T, Lanes, kFloat> {
  __device__ __forceinline__ FastCodeBits(const MergeProblem& p, int columns, int64_t row, int64_t column, int step)
      : FastCodes<T, Lanes, kFloat>(p, columns, row, column, step) {
    if (threadIdx.x < 16) {
      this->set_table(0, threadIdx.x, kept_halves(threadIdx.x));
      this->set_table(1, threadIdx.x, make_uint2(placed(threadIdx.x), 0));
    }
  }
  __device__ __forceinline__ uint2 merged(int h, int c, int half, const float (&sum)[4], float scaling) const {
    const uint32_t bits = this->bits(h, c) >> (4 * half);
    const uint8_t* const row = this->row_of(h, c);
    uint32_t codes;
    if (this->is_bitmap) {
      const uint32_t bit = this->first_of(h, c, half) << this->value_shift;
      const uint32_t* const from = reinterpret_cast<const uint32_t*>(row) + bit / 32;
      codes = __funnelshift_r(ptx::load_shared(from), ptx::load_shared(from + 1), bit);  // modulo 32
    } else if (this->is_int4) {
      codes = ptx::load_shared(reinterpret_cast<const uint32_t*>(row + this->column_of(c) / 2)) >> (16 * half);
    } else {
      const uint2 eight = ptx::load_shared(reinterpret_cast<const uint2*>(row + this->column_of(c)));
      codes = half ? eight.y : eight.x;
    }
    uint32_t bytes = this->bytes_from(codes);
    if (this->is_bitmap) bytes = ptx::pick_bytes(bytes, 0, this->look_up(1, bits).x);
    const float4 group = this->group_of(h, c);
    const float2 low = this->two_of(bytes, 0, group), high = this->two_of(bytes, 1, group);
    float values[4] = {fmaf(scaling, sum[0], low.x), fmaf(scaling, sum[1], low.y), fmaf(scaling, sum[2], high.x),
                       fmaf(scaling, sum[3], high.y)};
    this->requantize(values, h, c, half, group, [](int i) { return static_cast<uint32_t>(i); });
    const uint2 kept = this->look_up(0, bits);
    return make_uint2(rounded_pair<T>(values[0], values[1]) & kept.x, rounded_pair<T>(values[2], values[3]) & kept.y);
  }

 private:
  // The selector with which ptx::pick_bytes moves a bitmap's codes to their columns: nibble i is how many of four bits are set
  // before bit i.
  static __device__ __forceinline__ uint32_t placed(uint32_t bits) {
    uint32_t selector = 0;
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) selector |= static_cast<uint32_t>(__popc(bits & ((1u << i) - 1))) << (4 * i);
    return selector;
  }
};

template <typename T, typename Lanes>
using FastIntegerGroups = FastCodeGroups<T, Lanes, false>;
template <typename T, typename Lanes>
using FastE4m3Groups = FastCodeGroups<T, Lanes, true>;
template <typename T, typename Lanes>
using FastIntegerBits = FastCodeBits<T, Lanes, false>;
template <typename T, typename Lanes>
using FastE4m3Bits = FastCodeBits<T, Lanes, true>;

}  // namespace lors::cuda
