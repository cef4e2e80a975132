// SPDX-License-Identifier: Apache-2.0
// How the fast paths of the merge and of fused_linear read and merge each layout. A warp takes 16 rows x 64 columns of the
// weight at a time, a lane four times eight of them (FastLanes), named by h and c, and moves down by `step` rows. A Source<T,
// Lanes> offers
//   Source(p, columns, row, column, step)       row, column: the lane's first
//   load(number, limit, h, c)                   where number > limit, starts the loads of the next eight weights below those
//                                               loaded last; c = 0 before c = 1
//   clear()                                     the weights that no load replaces are zero
//   stage(p, row, column, rows)                 by the whole block, for the panel of rows from `row` on, of which `rows` exist
//   start(row, column, rows)                    after a barrier: the lane's first row of the panel of `rows`, the warp's column
//   step(p, at, rows)                           by the whole block, before the step at row `at` of the panel, of `rows`
//   merged(h, c, half, sum, scaling)            the first or second four of the eight last loaded, merged; `sum` is their
//                                               lora_B lora_A
//   Merged                                      what eight of them are: uint4, or uint2 for 2:4 values, where merged().y is
//   unused
#pragma once

#include "merge_fast_config.h"
#include "merge_problem.cuh"

namespace lors::cuda {

// Where a lane's weights are in the 16 rows x 64 columns of its warp. As they come from lora_B lora_A with a row in each
// operand's row: in rows n and n + 8 (h), n = lane / 4, eight lane % 4 of both times 32 columns (c). Transposed, with a column
// there: in rows n + c + 8 h, n = 2 (lane % 4), eight lane / 4. The block has kThreads threads.
template <bool kTransposed_, int kThreads_>
struct FastLanes {
  static constexpr bool kTransposed = kTransposed_;
  static constexpr int kThreads = kThreads_;
  static __device__ __forceinline__ int row() { return kTransposed ? threadIdx.x % 4 * 2 : threadIdx.x % kWarp / 4; }
  static __device__ __forceinline__ int eight() { return kTransposed ? threadIdx.x % kWarp / 4 : threadIdx.x % 4; }
  static __device__ __forceinline__ int below(int h, int c) { return kTransposed ? 8 * h + c : 8 * h; }  // rows below the first
};

// A block of a fast path, and where its warp and its lane are.
template <typename Lanes>
struct FastBlock {
  int warp_row, warp_column, step, rows;  // of the block
  unsigned row_block, column_block;
  int64_t row, column;  // the lane's first
  int below[2];         // rows from there on, where its eight c exist

  // `block`: of this problem.
  __device__ __forceinline__ FastBlock(const MergeProblem& p, int columns, unsigned block) {
    const int warp = threadIdx.x / kWarp, across = columns / 64;
    warp_row = warp / across * 16;
    warp_column = warp % across * 64;
    step = 16 * (Lanes::kThreads / kWarp) / across;
    row_block = block / static_cast<unsigned>(p.column_blocks);  // of 32 bits, as the number of blocks
    column_block = block - row_block * static_cast<unsigned>(p.column_blocks);
    const int64_t first_row = int64_t{row_block} * p.rows, first_column = int64_t{column_block} * columns;
    const int64_t rest = p.out_features - first_row;
    rows = rest < p.rows ? static_cast<int>(rest) : p.rows;
    row = first_row + warp_row + Lanes::row();
    column = first_column + warp_column + Lanes::eight() * 8;
    const int left = rows - warp_row - Lanes::row();
#pragma unroll
    for (int c = 0; c < 2; ++c) below[c] = column + (Lanes::kTransposed ? 0 : 32 * c) < p.in_features ? left : 0;
  }
};

// Two neighbouring weights, merged.
template <typename T>
__device__ __forceinline__ uint32_t merge_pair(uint32_t weights, float low, float high, float scaling) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return rounded_pair<T>(fmaf(scaling, low, __uint_as_float(weights << 16)),
                           fmaf(scaling, high, __uint_as_float(weights & 0xffff0000u)));
  } else {
    return rounded_pair<T>(fmaf(scaling, low, to_float(__ushort_as_half(static_cast<unsigned short>(weights)))),
                           fmaf(scaling, high, to_float(__ushort_as_half(static_cast<unsigned short>(weights >> 16)))));
  }
}

// Ones in each half whose value is not zero; -0.0 is zero, NaN is not.
template <typename T>
__device__ __forceinline__ uint32_t nonzero(uint32_t values) {
  using Two = std::conditional_t<std::is_same_v<T, bfloat16>, __nv_bfloat162, __half2>;
  Two two;
  memcpy(static_cast<void*>(&two), &values, sizeof(two));
  return __hneu2_mask(two, Two(0.f, 0.f));
}

// The lane's stored weights, a Vector for each eight.
template <typename Vector, typename Lanes>
struct FastRows {
  const uint8_t* from[2];  // row n + 8 h of the next load
  int64_t from_pitch, from_step;
  Vector tile[2][2] = {};

  __device__ __forceinline__ FastRows(const MergeProblem& p, int64_t row, int64_t column, int step)
      : from_pitch(p.in_features * int64_t{sizeof(Vector)} / 8), from_step(step * from_pitch) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
      from[h] = static_cast<const uint8_t*>(p.weight) + (row + 8 * h) * from_pitch + column * int64_t{sizeof(Vector)} / 8;
  }
  __device__ __forceinline__ void load(int number, int limit, int h, int c) {
    const int64_t offset = Lanes::kTransposed ? c * from_pitch : c * 4 * int64_t{sizeof(Vector)};
    ptx::load_global_if(number, limit, tile[h][c], reinterpret_cast<const Vector*>(from[h] + offset));
    if (c == 1) from[h] += from_step;
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 4; ++i) tile[i / 2][i % 2] = {};
  }
};

// The panel's part of the index in shared memory, and two tables of what four of its bits mean, at 8 bytes for each value.
template <typename Lanes>
struct FastIndex : IndexTile {
  const uint8_t* tables;
  const uint32_t* lane_words;  // of the lane's columns in its first row
  uint2 rows[2];               // of h, and of c = 0 and 1
  int rotate;                  // brings the lane's byte of a word to bit 3
  int step_words;              // from step to step

  __device__ __forceinline__ FastIndex(const MergeProblem& p, int step) : IndexTile(p), step_words(step * p.tile_pitch) {
    tables = ptx::dynamic_shared() + p.tile_at;
    words += kMergeFastTables / 4;
    rotate = (8 * (Lanes::eight() % 4) + 29) % 32;
  }
  __device__ __forceinline__ void start(int row, int column, int = 0) { lane_words = words + place(row, column); }
  __device__ __forceinline__ void read() {
#pragma unroll
    for (int h = 0; h < 2; ++h) rows[h] = both(lane_words, h);
    lane_words += step_words;
  }
  // The lane's word in such rows of words, in its first row; and the lane's two of h, from there.
  __device__ __forceinline__ int place(int row, int column) const {
    return row * pitch + column / 32 + (Lanes::kTransposed ? Lanes::eight() / 4 : 0);
  }
  __device__ __forceinline__ uint2 both(const uint32_t* first, int h) const {
    first += 8 * h * pitch;
    if constexpr (Lanes::kTransposed) return make_uint2(ptx::load_shared(first), ptx::load_shared(first + pitch));
    return ptx::load_shared(reinterpret_cast<const uint2*>(first));
  }
  // The lane's eight bits of 32 columns, from bit 3 on; above them are others.
  __device__ __forceinline__ uint32_t bits(int h, int c) const {
    const uint32_t word = c ? rows[h].y : rows[h].x;
    return __funnelshift_r(word, word, rotate);
  }
  // What table `which` says of four bits that begin at bit 3.
  __device__ __forceinline__ uint2 look_up(int which, uint32_t bits) const {
    return ptx::load_shared(reinterpret_cast<const uint2*>(tables + 128 * which + (bits & 0x78)));
  }
  __device__ __forceinline__ void set_table(int which, uint32_t i, const uint2& entry) const {
    ptx::store_shared(reinterpret_cast<uint2*>(const_cast<uint8_t*>(tables)) + 16 * which + i, entry);
  }
};

// Ones in each half that one of two bits keeps.
__device__ __forceinline__ uint32_t halves(uint32_t bits) { return (bits & 1 ? 0xffffu : 0u) | (bits & 2 ? 0xffff0000u : 0u); }
__device__ __forceinline__ uint2 kept_halves(uint32_t bits) { return make_uint2(halves(bits), halves(bits >> 2)); }

// Dense, kept where the weight is not zero.
template <typename T, typename Lanes>
struct FastDense : FastRows<uint4, Lanes> {
  using Merged = uint4;
  __device__ __forceinline__ FastDense(const MergeProblem& p, int, int64_t row, int64_t column, int step)
      : FastRows<uint4, Lanes>(p, row, column, step) {}
  __device__ __forceinline__ void stage(const MergeProblem&, int64_t, int64_t, int) const {}
  __device__ __forceinline__ void start(int, int, int) const {}
  __device__ __forceinline__ void step(const MergeProblem&, int, int) const {}
  __device__ __forceinline__ uint2 merged(int h, int c, int half, const float (&sum)[4], float scaling) const {
    const uint4& w = this->tile[h][c];
    const uint32_t first = half ? w.z : w.x, second = half ? w.w : w.y;
    return make_uint2(merge_pair<T>(first, sum[0], sum[1], scaling) & nonzero<T>(first),
                      merge_pair<T>(second, sum[2], sum[3], scaling) & nonzero<T>(second));
  }
};

// Dense, kept where a mask says so.
template <typename T, typename Lanes>
struct FastMasked : FastRows<uint4, Lanes>, FastIndex<Lanes> {
  using Merged = uint4;
  __device__ __forceinline__ FastMasked(const MergeProblem& p, int, int64_t row, int64_t column, int step)
      : FastRows<uint4, Lanes>(p, row, column, step), FastIndex<Lanes>(p, step) {
    if (threadIdx.x < 16) this->set_table(0, threadIdx.x, kept_halves(threadIdx.x));
  }
  __device__ __forceinline__ void stage(const MergeProblem& p, int64_t row, int64_t column, int) const {
    IndexTile::stage(p, row, column);
  }
  __device__ __forceinline__ void step(const MergeProblem&, int, int) { this->read(); }
  __device__ __forceinline__ uint2 merged(int h, int c, int half, const float (&sum)[4], float scaling) const {
    const uint4& w = this->tile[h][c];
    const uint2 kept = this->look_up(0, this->bits(h, c) >> (4 * half));
    return make_uint2(merge_pair<T>(half ? w.z : w.x, sum[0], sum[1], scaling) & kept.x,
                      merge_pair<T>(half ? w.w : w.y, sum[2], sum[3], scaling) & kept.y);
  }
};

// Of a 2:4 code: how ptx::pick_bytes(slots, 0) fills columns 0 and 1, and 2 and 3, from two 16-bit slots.
__device__ __forceinline__ uint2 placed_slots(uint32_t code) {
  uint32_t position[2], selectors = 0;
  slots_of(code, position);
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) selectors |= (position[0] == i ? 0x10u : position[1] == i ? 0x32u : 0x44u) << (8 * i);
  return make_uint2(selectors & 0xffff, selectors >> 16);
}

// What belongs to each slot of a group, of the four columns' sums; the code begins at bit 3. To a slot without a weight,
// anything.
__device__ __forceinline__ float2 slot_sums(uint32_t code, const float (&sum)[4]) {
  return make_float2(code & 16 ? sum[2] : code & 8 ? sum[1] : sum[0], code & 64 ? (code & 32 ? sum[3] : sum[2]) : sum[1]);
}

// From 2:4 to dense (Merged = uint4) or to 2:4 values in the same slots (uint2).
template <typename T, typename Lanes, typename Merged_>
struct FastGroups : FastRows<uint2, Lanes>, FastIndex<Lanes> {
  using Merged = Merged_;
  static constexpr bool kToDense = sizeof(Merged) == 16;

  __device__ __forceinline__ FastGroups(const MergeProblem& p, int, int64_t row, int64_t column, int step)
      : FastRows<uint2, Lanes>(p, row, column, step), FastIndex<Lanes>(p, step) {
    if (threadIdx.x < 16) this->set_table(0, threadIdx.x, entry(threadIdx.x));
  }
  __device__ __forceinline__ void stage(const MergeProblem& p, int64_t row, int64_t column, int) const {
    IndexTile::stage(p, row, column);
  }
  __device__ __forceinline__ void step(const MergeProblem&, int, int) { this->read(); }
  __device__ __forceinline__ uint2 merged(int h, int c, int half, const float (&sum)[4], float scaling) const {
    const uint32_t code = this->bits(h, c) >> (4 * half);
    const uint2 at = this->look_up(0, code);
    const float2 sums = slot_sums(code, sum);
    const uint32_t slots = merge_pair<T>(half ? this->tile[h][c].y : this->tile[h][c].x, sums.x, sums.y, scaling);
    if constexpr (kToDense) return make_uint2(ptx::pick_bytes(slots, 0, at.x), ptx::pick_bytes(slots, 0, at.y));
    return make_uint2(slots & at.x, 0);
  }

 private:
  // Of a code: to dense, placed_slots; else ones in the slots that hold a weight.
  static __device__ __forceinline__ uint2 entry(uint32_t code) {
    if constexpr (kToDense) return placed_slots(code);
    uint32_t position[2];
    slots_of(code, position);
    return make_uint2((position[0] < 4 ? 0xffffu : 0u) | (position[1] < 4 ? 0xffff0000u : 0u), 0);
  }
};
template <typename T, typename Lanes>
struct FastSparse24 : FastGroups<T, Lanes, uint4> {
  using FastGroups<T, Lanes, uint4>::FastGroups;
};
template <typename T, typename Lanes>
struct FastSparse24Values : FastGroups<T, Lanes, uint2> {
  using FastGroups<T, Lanes, uint2>::FastGroups;
};

// Stored weights that are copied to shared memory in whole sectors of 32 bytes, one step ahead: the values of a bitmap, or
// codes in any layout (merge_fast_quantized.cuh), here called values too. A bitmap's row begins there with the sector that has
// its first value.
template <typename Lanes>
struct FastCopies : FastIndex<Lanes> {
  using FastIndex<Lanes>::pitch, FastIndex<Lanes>::words;
  const uint8_t* weight;
  bool is_bitmap;
  int value_shift;  // log2 of the bits of a value
  int row_shift;    // log2 of how many threads copy a row
  int step_rows, row_pitch;
  uint32_t* before;  // bitmap: [panel_rows, pitch]: how many values the row in shared memory has before each word's, and behind
                     // the last word how many in all
  int64_t* begin;    // bitmap: [panel_rows]: the byte of the weight with which the row in shared memory begins
  uint8_t* fetched;  // [2, step_rows, row_pitch] bytes: two steps in turn
  int64_t weight_bytes;  // bitmap: of all values
  int64_t row_bytes;     // other layouts: of a whole row
  int64_t first_byte;    // other layouts: with which the block's columns begin in the panel's first row
  int block_bytes;       // other layouts: of the block's columns in a row
  int lane_row, lane_place;
  const uint8_t* lane_values;  // the lane's first row in `fetched`
  uint2 starts[2];             // bitmap: `before` of the lane's words of h, c = 0 and 1

  __device__ __forceinline__ FastCopies(const MergeProblem& p, int step, bool is_bitmap_, int value_shift_, int row_shift_,
                                        int row_pitch_)
      : FastIndex<Lanes>(p, step),
        weight(static_cast<const uint8_t*>(p.weight)),
        is_bitmap(is_bitmap_),
        value_shift(value_shift_),
        row_shift(row_shift_),
        step_rows(step),
        row_pitch(row_pitch_) {
    before = words + p.panel_rows * pitch;
    begin = reinterpret_cast<int64_t*>(before + (is_bitmap ? p.panel_rows * pitch : 0));
    fetched = reinterpret_cast<uint8_t*>(begin + (is_bitmap ? p.panel_rows : 0));
    if (is_bitmap) weight_bytes = bytes_of(ptx::load_global(p.row_offsets + p.out_features));
    // What lies behind a row's last value is read too, and dropped.
    for (int i = threadIdx.x; i < 2 * step_rows * row_pitch / 16; i += Lanes::kThreads)
      ptx::store_shared(reinterpret_cast<uint4*>(fetched) + i, uint4{});
  }
  __device__ __forceinline__ void load(int, int, int, int) const {}
  __device__ __forceinline__ void clear() const {}
  __device__ __forceinline__ void stage(const MergeProblem& p, int64_t row, int64_t column, int rows) const {
    IndexTile::stage(p, row, column);
    if (!is_bitmap) return;
    __syncthreads();  // the index is there
    const int columns = 32 * (pitch - 4);
    for (int i = threadIdx.x; i < p.panel_rows; i += Lanes::kThreads) {
      int64_t first = 0;  // where there is no such row: of its words, no bit is set
      if (i < rows)
        first = ptx::load_global(p.row_offsets + row + i) +
                ptx::load_global(p.before + (row + i) * p.column_blocks + column / columns);
      const uint32_t at = static_cast<uint32_t>(first) & ((8 * kSector >> value_shift) - 1);
      ptx::store_shared(begin + i, bytes_of(first - at));
      ptx::store_shared(before + i * pitch + columns / 32, this->count_before(before, i, at));
    }
  }
  __device__ __forceinline__ void start(int row, int column, int rows) {
    FastIndex<Lanes>::start(row, column);
    lane_row = row;
    lane_place = this->place(row, column);
    copy(0, rows, 0);
  }
  __device__ __forceinline__ void step(const MergeProblem&, int at, int rows) {
    const int buffer = at / step_rows % 2;
    ptx::cp_async_wait<0>();
    __syncthreads();  // this step's values are there, and the last one's have been read
    copy(at + step_rows, rows, 1 - buffer);
    this->read();
    lane_values = fetched + row_pitch * (buffer * step_rows + lane_row);
    if (!is_bitmap) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) starts[h] = this->both(before + at * pitch + lane_place, h);
  }
  // The row in shared memory of the lane's eight weights h, c.
  __device__ __forceinline__ const uint8_t* row_of(int h, int c) const { return lane_values + row_pitch * Lanes::below(h, c); }
  // Bitmap: how many values that row has before those of the first or second four of these eight.
  __device__ __forceinline__ uint32_t first_of(int h, int c, int half) const {
    const uint32_t mask = this->bits(h, c), word = c ? this->rows[h].y : this->rows[h].x;
    uint32_t first = (c ? starts[h].y : starts[h].x) + __popc(word & ((1u << 8 * (Lanes::eight() % 4)) - 1));
    if (half) first += __popc(mask & 0x78);
    return first;
  }

 private:
  static constexpr int kSector = 32;  // bytes

  template <typename Count>
  __device__ __forceinline__ Count bytes_of(Count values) const {
    return ((values << value_shift) + 7) >> 3;
  }
  // Starts the copies of the panel's rows [at, at + step_rows). Reads nothing behind the weight.
  __device__ __forceinline__ void copy(int at, int rows, int buffer) const {
#pragma unroll 1
    for (int i = threadIdx.x >> row_shift; i < step_rows && at + i < rows; i += Lanes::kThreads >> row_shift) {
      const uint8_t* from = weight;
      int end = block_bytes, left = end;
      if (is_bitmap) {
        const int64_t first = ptx::load_shared(begin + at + i);
        end = static_cast<int>(bytes_of(ptx::load_shared(before + (at + i) * pitch + pitch - 4)));
        left = weight_bytes - first < end + 16 ? static_cast<int>(weight_bytes - first) : end + 16;
        from += first;
      } else {
        from += first_byte + (at + i) * row_bytes;
      }
      const uint32_t to = ptx::shared_address(fetched) + row_pitch * (buffer * step_rows + i);
#pragma unroll 1
      for (int e = 16 * (threadIdx.x & ((1 << row_shift) - 1)); e < end; e += 16 << row_shift)
        ptx::cp_async_16(to + e, from + e, left - e < 16 ? left - e : 16);
    }
    ptx::cp_async_commit();
  }
};

// From a bitmap of 16-bit values, each of whose rows a warp copies.
template <typename T, typename Lanes>
struct FastBitmap : FastCopies<Lanes> {
  using Merged = uint4;

  __device__ __forceinline__ FastBitmap(const MergeProblem& p, int columns, int64_t, int64_t, int step)
      : FastCopies<Lanes>(p, step, true, 4, 5, fast_row_pitch(Layout::bitmap, Grid::none, columns)) {
    if (threadIdx.x < 16) {
      this->set_table(0, threadIdx.x, kept_halves(threadIdx.x));
      this->set_table(1, threadIdx.x, placed(threadIdx.x));
    }
  }
  __device__ __forceinline__ uint2 merged(int h, int c, int half, const float (&sum)[4], float scaling) const {
    const uint32_t bits = this->bits(h, c) >> (4 * half), first = this->first_of(h, c, half);
    const uint32_t* const at = reinterpret_cast<const uint32_t*>(this->row_of(h, c)) + first / 2;
    const uint32_t v[3] = {ptx::load_shared(at), ptx::load_shared(at + 1), ptx::load_shared(at + 2)};
    const uint32_t shift = 16 * first, x = __funnelshift_r(v[0], v[1], shift),
                   y = __funnelshift_r(v[1], v[2], shift);  // modulo 32
    const uint2 kept = this->look_up(0, bits), places = this->look_up(1, bits);
    return make_uint2(merge_pair<T>(ptx::pick_bytes(x, y, places.x), sum[0], sum[1], scaling) & kept.x,
                      merge_pair<T>(ptx::pick_bytes(x, y, places.y), sum[2], sum[3], scaling) & kept.y);
  }

 private:
  // How ptx::pick_bytes fills columns 0 and 1, and 2 and 3, from the values of those that four bits keep.
  static __device__ __forceinline__ uint2 placed(uint32_t bits) {
    uint32_t selectors = 0;
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t value = __popc(bits & ((1u << i) - 1));
      selectors |= (bits >> i & 1 ? 0x10u + 0x22u * value : 0u) << (8 * i);
    }
    return make_uint2(selectors & 0xffff, selectors >> 16);
  }
};

}  // namespace lors::cuda
