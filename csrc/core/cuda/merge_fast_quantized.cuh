// SPDX-License-Identifier: Apache-2.0
// How the fast path reads quantised codes (lors/quantization.h), and requantises what it merged: Sources as in
// merge_fast_source.cuh. The codes of a block's rows come into shared memory in whole sectors, one step ahead; scales and zero
// points once for each panel, a group's as four floats: scale, zero point + 2^23 + half of the codes' number, and, where it is
// requantised, 1 / (steps scale) and the result's zero point. An integer code becomes float32 as the last bits of 2^23.
// Requantising and its dither are switches of the launch, and so are int8 or int4, and dense or bitmap.
#pragma once

#include "merge_fast_source.cuh"
#include "quantized.cuh"

namespace lors::cuda {

// What all have in common. kFloat: of e4m3; else int8 or int4.
template <typename T, typename Lanes, bool kFloat>
struct FastCodes : FastIndex<Lanes> {
  using Merged = uint4;
  static constexpr bool kReadsCodes = true;
  using FastIndex<Lanes>::pitch, FastIndex<Lanes>::words;
  const MergeProblem& p;
  bool four_bits, counted;  // int4; bitmap
  int step_rows, code_pitch, group_pitch, groups_across, group_shift;
  int row_lanes;      // log2 of how many threads copy a row
  int64_t row_bytes;  // not of a bitmap: of a whole row; of the block's part of it
  int block_bytes;
  int64_t code_count;  // bitmap: bytes of all codes
  uint32_t* before;    // bitmap: [panel_rows, pitch]: number of the word's first code in the row in shared memory; behind the
                       // last word, the end
  float4* groups;      // [panel_rows, group_pitch]
  uint8_t* fetched;    // [2, step_rows, code_pitch]
  int64_t* begin;      // bitmap: [panel_rows]: the byte of the codes where the row in shared memory begins
  RandomRow* keys;     // [panel_rows]: of the dither
  int64_t panel_row, block_column;
  int lane_row, lane_column;  // the lane's first, of the panel and the block
  int at;                     // the step's first row of the panel
  const uint8_t* lane_codes;  // of the lane's first row
  uint2 starts[2];            // bitmap: of h

  __device__ __forceinline__ FastCodes(const MergeProblem& problem, int columns, int step)
      : FastIndex<Lanes>(problem, step), p(problem), step_rows(step) {
    const Quantization& q = p.quantization;
    four_bits = !kFloat && q.grid == Grid::int4;
    counted = p.layout == Layout::bitmap;
    code_pitch = fast_code_pitch(p.layout, q.grid, columns);
    groups_across = fast_groups(columns, q.group);
    group_pitch = fast_group_pitch(columns, q.group);
    group_shift = q.group == 32 ? 5 : q.group == 64 ? 6 : q.group == 128 ? 7 : 31;
    row_lanes = (columns == 512 ? 5 : 4) - four_bits - (p.layout != Layout::dense);
    before = words + p.panel_rows * pitch;
    groups = reinterpret_cast<float4*>(before + (counted ? p.panel_rows * pitch : 0));
    fetched = reinterpret_cast<uint8_t*>(groups + p.panel_rows * group_pitch);
    begin = reinterpret_cast<int64_t*>(fetched + 2 * step_rows * code_pitch);
    keys = reinterpret_cast<RandomRow*>(begin + p.panel_rows);
    row_bytes = fast_code_bytes(p.layout, q.grid, p.in_features);
    if (counted) code_count = bytes_of(ptx::load_global(p.row_offsets + p.out_features));
    // What lies behind a row's last code is read too, and dropped.
    for (int i = threadIdx.x; i < 2 * step_rows * code_pitch / 16; i += Lanes::kThreads)
      ptx::store_shared(reinterpret_cast<uint4*>(fetched) + i, uint4{});
  }
  __device__ __forceinline__ void load(int, int, int, int) const {}
  __device__ __forceinline__ void clear() const {}

  __device__ __forceinline__ void stage(const MergeProblem&, int64_t row, int64_t column, int rows) {
    const Quantization& q = p.quantization;
    panel_row = row;
    block_column = column;
    const int64_t left = p.in_features - column;
    const int columns = 32 * (pitch - 4);
    block_bytes = fast_code_bytes(p.layout, q.grid, left < columns ? left : columns);
    IndexTile::stage(p, row, column);
    const int64_t in_row = static_cast<unsigned>(p.in_features) / static_cast<unsigned>(q.group);
    for (int task = threadIdx.x; task < p.panel_rows * groups_across; task += Lanes::kThreads) {
      const int i = task / groups_across, j = task % groups_across;
      const int64_t first = column + (int64_t{j} << group_shift);
      float4 entry{};
      if (i < rows && first < p.in_features) {
        const CodeGroup group = CodeGroup::load(q, (row + i) * in_row + (first >> group_shift));
        entry.x = group.scale;
        entry.y = 8388608.f + (four_bits ? 8.f : 128.f) + group.zero;
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
    if (!counted) return;
    __syncthreads();  // the index is there
    const int quads = pitch / 4 - 1;
    for (int i = threadIdx.x; i < p.panel_rows; i += Lanes::kThreads) {
      int64_t first = 0;  // where there is no such row: of its words, no bit is set
      if (i < rows)
        first = ptx::load_global(p.row_offsets + row + i) +
                ptx::load_global(p.before + (row + i) * p.column_blocks + column / (128 * quads));
      const int64_t sector = (four_bits ? first / 2 : first) / 32 * 32;
      uint32_t count = static_cast<uint32_t>(first - (four_bits ? 2 * sector : sector));
      ptx::store_shared(begin + i, sector);
      for (int quad = 0; quad < quads; ++quad) {
        const uint4 v = ptx::load_shared(reinterpret_cast<const uint4*>(words + i * pitch) + quad);
        uint4 sums = make_uint4(count, count + __popc(v.x), 0, 0);
        sums.z = sums.y + __popc(v.y);
        sums.w = sums.z + __popc(v.z);
        count = sums.w + __popc(v.w);
        ptx::store_shared(reinterpret_cast<uint4*>(before + i * pitch) + quad, sums);
      }
      ptx::store_shared(before + i * pitch + 4 * quads, count);
    }
  }
  __device__ __forceinline__ void start(int row, int column, int rows) {
    FastIndex<Lanes>::start(row, column);
    lane_row = row;
    lane_column = column + 8 * Lanes::eight();
    copy(0, rows, 0);
  }
  __device__ __forceinline__ void step(const MergeProblem&, int row, int rows) {
    const int buffer = row / step_rows % 2;
    ptx::cp_async_wait<0>();
    __syncthreads();  // this step's codes are there, and the last one's have been read
    copy(row + step_rows, rows, 1 - buffer);
    this->read();
    at = row;
    lane_codes = fetched + (buffer * step_rows + lane_row) * code_pitch;
    if (counted) {
      const uint32_t* const first = before + row * pitch + this->place(lane_row, lane_column - 8 * Lanes::eight());
#pragma unroll
      for (int h = 0; h < 2; ++h) starts[h] = this->both(first, h);
    }
  }

  static __device__ __forceinline__ int below(int h, int c) { return Lanes::below(h, c); }
  // Of the 32 columns c of the lane, from the block's first on.
  __device__ __forceinline__ int column_of(int c) const { return lane_column + (Lanes::kTransposed ? 0 : 32 * c); }
  __device__ __forceinline__ float4 group_of(int h, int c) const {
    return ptx::load_shared(groups + (at + lane_row + below(h, c)) * group_pitch + (column_of(c) >> group_shift));
  }
  // Four bytes of codes, from four bytes or four nibbles. Integers without a sign: 0 is the lowest.
  __device__ __forceinline__ uint32_t bytes_from(uint32_t codes) const {
    if (kFloat) return codes;
    if (!four_bits) return codes ^ 0x80808080u;
    return ptx::pick_bytes((codes ^ 0x8888u) & 0x0f0fu, (codes ^ 0x8888u) >> 4 & 0x0f0fu, 0x5140);
  }
  // Of bytes 2 i and 2 i + 1: the weights, without the update.
  __device__ __forceinline__ float2 two_of(uint32_t bytes, int i, const float4& group) const {
    float2 two;
    if constexpr (kFloat) {
      two = ptx::e4m3_values(bytes >> (16 * i));
    } else {
      two.x = __uint_as_float(ptx::pick_bytes(bytes, 0x4b000000u, 0x7650 | 2 * i)) - group.y;
      two.y = __uint_as_float(ptx::pick_bytes(bytes, 0x4b000000u, 0x7651 | 2 * i)) - group.y;
    }
    return make_float2(__fmul_rn(two.x, group.x), __fmul_rn(two.y, group.x));
  }
  // Of merged values of one group, before they are rounded; column(i): of the weight.
  template <int kCount, typename Column>
  __device__ __forceinline__ void requantize(float (&values)[kCount], int h, int c, const float4& group,
                                             const Column& column) const {
    const Quantization& q = p.quantization;
    if (q.requantize_steps == 0) return;
    const Requantized onto(q, group.x, group.w, group.z, kFloat);
    if (!kFloat && q.dither_seed >= 0) {
      const RandomRow key = ptx::load_shared(keys + at + lane_row + below(h, c));
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = onto(values[i], dither(key, column(i)));
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = onto(values[i], 0.f);
    }
  }

 private:
  __device__ __forceinline__ int64_t bytes_of(int64_t codes) const { return four_bits ? (codes + 1) / 2 : codes; }

  // Starts the copies of the rows at..at + step_rows of the panel.
  __device__ __forceinline__ void copy(int row, int rows, int buffer) const {
    const auto* const codes = static_cast<const uint8_t*>(p.weight);
#pragma unroll 1
    for (int i = threadIdx.x >> row_lanes; i < step_rows && row + i < rows; i += Lanes::kThreads >> row_lanes) {
      const uint8_t* from = codes;
      int end = block_bytes, left = end;
      if (counted) {
        const int64_t first = ptx::load_shared(begin + row + i);
        end = static_cast<int>(bytes_of(ptx::load_shared(before + (row + i) * pitch + pitch - 4)));
        left = code_count - first < end + 16 ? static_cast<int>(code_count - first) : end + 16;  // nothing behind the codes
        from += first;
      } else {
        from += (panel_row + row + i) * row_bytes + fast_code_bytes(p.layout, p.quantization.grid, block_column);
      }
      const uint32_t to = ptx::shared_address(fetched) + (buffer * step_rows + i) * code_pitch;
#pragma unroll 1
      for (int e = 16 * (threadIdx.x & ((1 << row_lanes) - 1)); e < end; e += 16 << row_lanes)
        ptx::cp_async_16(to + e, from + e, left - e < 16 ? left - e : 16);
    }
    ptx::cp_async_commit();
  }
};

// From 2:4: both slots of a group are merged, and then placed.
template <typename T, typename Lanes, bool kFloat>
struct FastCodeGroups : FastCodes<T, Lanes, kFloat> {
  using Base = FastCodes<T, Lanes, kFloat>;

  __device__ __forceinline__ FastCodeGroups(const MergeProblem& p, int columns, int64_t, int64_t, int step)
      : Base(p, columns, step) {
    if (threadIdx.x < 16) this->set_table(0, threadIdx.x, placed_slots(threadIdx.x));
  }
  __device__ __forceinline__ uint2 merged(int h, int c, int half, const float (&sum)[4], float scaling) const {
    const uint32_t code = this->bits(h, c) >> (4 * half);
    const uint2 places = this->look_up(0, code);
    // The lane's eight columns are four codes.
    const uint8_t* const from = this->lane_codes + Base::below(h, c) * this->code_pitch;
    const int first = this->column_of(c) / 2;
    const uint32_t codes = this->four_bits ? ptx::load_shared(reinterpret_cast<const uint16_t*>(from + first / 2))
                                           : ptx::load_shared(reinterpret_cast<const uint32_t*>(from + first));
    const float4 group = this->group_of(h, c);
    const float2 slots = this->two_of(this->bytes_from(codes), half, group);
    const uint32_t position[2] = {code & 16 ? 2u : code >> 3 & 1, code & 64 ? 2 + (code >> 5 & 1) : 1u};
    float values[2] = {fmaf(scaling,
                            code & 16  ? sum[2]
                            : code & 8 ? sum[1]
                                       : sum[0],
                            slots.x),
                       fmaf(scaling, code & 64 ? (code & 32 ? sum[3] : sum[2]) : sum[1], slots.y)};
    this->requantize(values, h, c, group, [&](int i) {
      return static_cast<uint32_t>(this->block_column) + this->column_of(c) + 4 * half + position[i];
    });
    const uint32_t pair = rounded_pair<T>(values[0], values[1]);
    return make_uint2(ptx::pick_bytes(pair, 0, places.x), ptx::pick_bytes(pair, 0, places.y));
  }
};

// Dense with a mask, and bitmap.
template <typename T, typename Lanes, bool kFloat>
struct FastCodeBits : FastCodes<T, Lanes, kFloat> {
  using Base = FastCodes<T, Lanes, kFloat>;

  __device__ __forceinline__ FastCodeBits(const MergeProblem& p, int columns, int64_t, int64_t, int step)
      : Base(p, columns, step) {
    if (threadIdx.x < 16) {
      this->set_table(0, threadIdx.x, kept_halves(threadIdx.x));
      this->set_table(1, threadIdx.x, make_uint2(placed(threadIdx.x), 0));
    }
  }
  __device__ __forceinline__ uint2 merged(int h, int c, int half, const float (&sum)[4], float scaling) const {
    const uint32_t mask = this->bits(h, c), bits = mask >> (4 * half);
    const uint8_t* const from = this->lane_codes + Base::below(h, c) * this->code_pitch;
    uint32_t codes;
    if (this->counted) {
      const uint32_t word = c ? this->rows[h].y : this->rows[h].x;
      uint32_t first = (c ? this->starts[h].y : this->starts[h].x) + __popc(word & ((1u << 8 * (Lanes::eight() % 4)) - 1));
      if (half) first += __popc(mask & 0x78);
      const uint32_t bit = first << (this->four_bits ? 2 : 3);
      const uint32_t* const at = reinterpret_cast<const uint32_t*>(from) + bit / 32;
      codes = __funnelshift_r(ptx::load_shared(at), ptx::load_shared(at + 1), bit);  // modulo 32
    } else if (this->four_bits) {
      codes = ptx::load_shared(reinterpret_cast<const uint32_t*>(from + this->column_of(c) / 2)) >> (16 * half);
    } else {
      const uint2 eight = ptx::load_shared(reinterpret_cast<const uint2*>(from + this->column_of(c)));
      codes = half ? eight.y : eight.x;
    }
    uint32_t bytes = this->bytes_from(codes);
    if (this->counted) bytes = ptx::pick_bytes(bytes, 0, this->look_up(1, bits).x);
    const float4 group = this->group_of(h, c);
    const float2 low = this->two_of(bytes, 0, group), high = this->two_of(bytes, 1, group);
    float values[4] = {fmaf(scaling, sum[0], low.x), fmaf(scaling, sum[1], low.y), fmaf(scaling, sum[2], high.x),
                       fmaf(scaling, sum[3], high.y)};
    this->requantize(values, h, c, group,
                     [&](int i) { return static_cast<uint32_t>(this->block_column) + this->column_of(c) + 4 * half + i; });
    const uint2 kept = this->look_up(0, bits);
    return make_uint2(rounded_pair<T>(values[0], values[1]) & kept.x, rounded_pair<T>(values[2], values[3]) & kept.y);
  }

 private:
  // Which of the codes of those that four bits keep becomes column i, in nibble i.
  static __device__ __forceinline__ uint32_t placed(uint32_t bits) {
    uint32_t selector = 0;
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) selector |= static_cast<uint32_t>(__popc(bits & ((1u << i) - 1))) << (4 * i);
    return selector;
  }
};

template <typename T, typename Lanes>
struct FastIntegerGroups : FastCodeGroups<T, Lanes, false> {
  using FastCodeGroups<T, Lanes, false>::FastCodeGroups;
};
template <typename T, typename Lanes>
struct FastE4m3Groups : FastCodeGroups<T, Lanes, true> {
  using FastCodeGroups<T, Lanes, true>::FastCodeGroups;
};
template <typename T, typename Lanes>
struct FastIntegerBits : FastCodeBits<T, Lanes, false> {
  using FastCodeBits<T, Lanes, false>::FastCodeBits;
};
template <typename T, typename Lanes>
struct FastE4m3Bits : FastCodeBits<T, Lanes, true> {
  using FastCodeBits<T, Lanes, true>::FastCodeBits;
};

}  // namespace lors::cuda
