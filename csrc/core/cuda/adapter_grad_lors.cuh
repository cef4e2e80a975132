// SPDX-License-Identifier: Apache-2.0
// The "lors" adapter gradients in two launches, each for X and dY at once (Z [tokens, features] is one of them):
//   project_kernel    P = X A^T and Q = dY B:   projected[t, p] = sum_f Z[t, f] factor[f, p]
//   gradient_kernel   dY^T P and X^T Q:         gradient[f, p] = s sum_t Z[t, f] projected[t, p]
// P and Q are stored as bfloat16 split terms. Where blocks have ranges of tokens, gradient_kernel writes partial sums for
// reduce.cu. Launched by adapter_grad_lors.cu; more than 128 ranks take several passes.
#pragma once

#include "adapter_grad_lors_config.h"
#include "reduce.cuh"

namespace lors::cuda {

struct ProjectSide {
  const void* z;          // [tokens, features] row-major, of the kernel's type Z
  const int32_t* gather;  // as in Experts
  int64_t features;
  Matrix factor;            // of one expert: lora_A [r, features] where by_rank, or lora_B [features, r]
  uint16_t* projected;      // [terms, tokens, width] bfloat16
  int terms, factor_pitch;  // of a tile of the factor in shared memory, where not by_rank
  bool z_vectors, by_rank;
};
struct ProjectProblem {
  ProjectSide side[2];
  ExpertRows experts;
  int64_t tokens, rank;  // the pass has the ranks [rank, rank + width)
  int width, token_tiles, factor_at, stage;
  unsigned blocks;  // of the first side
};

struct GradientSide {
  const void* z;              // as above
  int64_t features, tiles;    // tiles: of one expert
  const uint16_t* projected;  // of the other side: [terms, tokens, width] bfloat16
  float* partials;            // [ranges, sums.rows, sums.width]; null: one range, and the sums go to sums.out
  PartialSums sums;           // of one expert
  int terms;
  bool z_vectors, transposed;  // transposed: the sums are [ranks, features]
  const int32_t* gather;       // as above
  int64_t expert_rows;         // of the result, from expert to expert
};
struct GradientProblem {
  GradientSide side[2];
  ExpertRows experts;
  int64_t tokens, range_tokens;
  int width, feature_groups, token_groups, step_tokens, terms_at, stage;
  int pitch, terms_pitch;  // of the tiles in shared memory
  unsigned blocks;         // of the first side
};

// Starts copying a tile of a matrix to shared memory as it lies there, zeros outside of the matrix: `rows` of 1 << shift
// vectors of 16 bytes. `from` is the tile's first element; `left_rows` and `left_columns` of the matrix follow it. With
// `gather`, that of the tile's rows, `from` is in row 0 of the memory. By cp.async where rows are aligned. kEightRows: eight
// lanes take the same vector of eight rows, against bank conflicts of short rows.
template <bool kEightRows, typename T>
__device__ __forceinline__ void copy_tile(T* to, int pitch, int rows, int shift, const T* from, int64_t left_rows,
                                          int64_t left_columns, int64_t columns, bool vectors,
                                          const int32_t* gather = nullptr) {
  const int thread = static_cast<int>(threadIdx.x);
  const int column = ((kEightRows ? thread / 8 : thread) & ((1 << shift) - 1)) * kVectorElements<T>;
  int row = kEightRows ? (thread >> (3 + shift)) * 8 + thread % 8 : thread >> shift;
  const int rows_apart = static_cast<int>(blockDim.x) >> shift;
  to += row * pitch + column;
  for (; row < rows; row += rows_apart, to += rows_apart * pitch) {
    const bool inside = row < left_rows && column < left_columns;
    // Multiplied out: running pointers would be registers too many.
    const T* const at = from + (gather && inside ? ptx::load_global(gather + row) : row) * columns + column;
    if (vectors)
      ptx::cp_async_16(ptx::shared_address(to), inside ? at : from, inside ? 16 : 0);
    else
      ptx::store_shared(reinterpret_cast<uint4*>(to), gather_vector(at, 0, inside ? left_columns - column : 0));
  }
}

// The split terms of a pair of neighbours as registers of mma.
template <int kTerms>
__device__ __forceinline__ void split_pair(uint32_t (&terms)[3][4], int i, float low, float high) {
#pragma unroll
  for (int term = 0; term < kTerms; ++term) terms[term][i] = next_term_pair(low, high);
}

// Four 8x8 blocks of a tile in shared memory, 16 x 16 elements, as split terms in the registers of mma. Block i begins in row
// 8 (i % 2), column 8 (i / 2), or the other way round where kColumnsFirst. kTranspose: of the transposed blocks.
template <typename T, bool kTranspose, bool kColumnsFirst>
__device__ __forceinline__ void load_terms(uint32_t (&terms)[3][4], const T* tile, int pitch) {
  const int lane = threadIdx.x % kWarp;
  const auto block = [](int i, bool of_columns) { return (of_columns == kColumnsFirst ? i % 2 : i / 2) * 8; };
  if constexpr (sizeof(T) == 2) {
    const uint32_t from = ptx::shared_address(tile + (lane % 8 + block(lane / 8, false)) * pitch + block(lane / 8, true));
    if constexpr (kTranspose)
      ptx::ldmatrix_x4_trans(terms[0], from);
    else
      ptx::ldmatrix_x4(terms[0], from);
    if constexpr (std::is_same_v<T, float16>) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t both = terms[0][i];
        split_pair<2>(terms, i, to_float(__ushort_as_half(static_cast<unsigned short>(both))),
                      to_float(__ushort_as_half(static_cast<unsigned short>(both >> 16))));
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kTranspose) {
        const T* from = tile + (block(i, false) + lane % 4 * 2) * pitch + block(i, true) + lane / 4;
        split_pair<3>(terms, i, ptx::load_shared(from), ptx::load_shared(from + pitch));
      } else {
        const float2 both = ptx::load_shared(
            reinterpret_cast<const float2*>(tile + (block(i, false) + lane / 4) * pitch + block(i, true) + lane % 4 * 2));
        split_pair<3>(terms, i, both.x, both.y);
      }
    }
  }
}

// Offset of element [row, column] of a warp's sums, rows of 16 floats accessed in pairs and fours.
__device__ __forceinline__ int sum_place(int row, int column) { return row * 16 + (column ^ (row / 2 % 2) * 8); }

// The sum of `count` warps' float4 at `from`, `apart` floats apart, in their order.
__device__ __forceinline__ float4 add_warps(const float* from, int count, int apart) {
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  for (int i = 0; i < count; ++i, from += apart) {
    const float4 part = ptx::load_shared(reinterpret_cast<const float4*>(from));
    sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
  }
  return sum;
}

// ---- P and Q ----------------------------------------------------------------------------------------------------------------

// Of a tile of Z, or of lora_A, in shared memory.
template <typename T>
constexpr int kProjectPitch = lors_pitch(kProjectFeatures, sizeof(T), false);

template <typename Z>
struct ProjectBlock {
  static constexpr int kTerms = split_terms(dtype_of<Z>()), kStages = lors_stages(sizeof(Z));
  static constexpr int kPitch = kProjectPitch<Z>;
  using Sum = float[kProjectTiles][2][4];  // [m][n]: 16 tokens from 16 m, 8 ranks from 8 n of the warp's 16

  const ProjectProblem& p;
  const ProjectSide& side;
  ExpertTile tile;
  int rank_groups, feature_groups, rank_group, feature_group;  // of the block's warps; this warp's

  __device__ __forceinline__ explicit ProjectBlock(const ProjectProblem& problem)
      : p(problem), side(problem.side[blockIdx.x >= problem.blocks]) {
    tile = expert_tile(p.experts, p.tokens, 16 * p.token_tiles, blockIdx.x - (blockIdx.x >= p.blocks ? p.blocks : 0));
    const int warp = threadIdx.x / kWarp;
    rank_groups = p.width / 16;
    feature_groups = kLorsWarps / rank_groups;
    rank_group = warp % rank_groups;
    feature_group = warp / rank_groups;
  }

  __device__ __forceinline__ bool has_tokens() const { return tile.rows > 0 && tile.expert < p.experts.count; }
  __device__ __forceinline__ uint8_t* stage(int step) const { return ptx::dynamic_shared() + step % kStages * p.stage; }

  template <typename F>
  __device__ __forceinline__ void copy_factor(int step, int64_t left) const {
    constexpr int kShift = sizeof(F) == 4 ? 5 : 4;  // of kProjectFeatures elements
    const Matrix m = of_expert(side.factor, tile.expert);
    F* const to = reinterpret_cast<F*>(stage(step) + p.factor_at);
    const int64_t feature = int64_t{step} * kProjectFeatures;
    const F* const data = static_cast<const F*>(m.data);
    if (side.by_rank)
      copy_tile<false>(to, kProjectPitch<F>, p.width, kShift, data + p.rank * m.columns + feature, m.rows - p.rank, left,
                       m.columns, m.vectors);
    else
      copy_tile<true>(to, side.factor_pitch, kProjectFeatures, __ffs(p.width / kVectorElements<F>) - 1,
                      data + feature * m.columns + p.rank, left, m.columns - p.rank, m.columns, m.vectors);
  }
  __device__ __forceinline__ void copy(int step) const {
    const int64_t feature = int64_t{step} * kProjectFeatures, left = side.features - feature;
    if (left > 0) {
      constexpr int kShift = sizeof(Z) == 4 ? 5 : 4;
      copy_tile<false>(reinterpret_cast<Z*>(stage(step)), kPitch, 16 * p.token_tiles, kShift,
                       static_cast<const Z*>(side.z) + (side.gather ? 0 : int64_t{tile.first} * side.features) + feature,
                       tile.rows, left, side.features, side.z_vectors, side.gather ? side.gather + tile.first : nullptr);
      if (side.factor.dtype == DType::float32)
        copy_factor<float>(step, left);
      else
        copy_factor<bfloat16>(step, left);  // of either 16-bit type
    }
    ptx::cp_async_commit();
  }

  template <typename F>
  __device__ __forceinline__ void load_factor(uint32_t (&b)[3][4], int step, int feature) const {
    const F* const tile = reinterpret_cast<const F*>(stage(step) + p.factor_at);
    if (side.by_rank) {
      load_terms<F, false, true>(b, tile + 16 * rank_group * kProjectPitch<F> + feature, kProjectPitch<F>);
    } else {
      load_terms<F, true, false>(b, tile + feature * side.factor_pitch + 16 * rank_group, side.factor_pitch);
    }
  }

  __device__ __forceinline__ void multiply(Sum& sum, int step) const {
    const Z* const z = reinterpret_cast<const Z*>(stage(step));
    const int factor_terms = split_terms(side.factor.dtype);
#pragma unroll 1
    for (int feature = 16 * feature_group; feature < kProjectFeatures; feature += 16 * feature_groups) {
      uint32_t b[3][4];
      if (side.factor.dtype == DType::bfloat16)
        load_factor<bfloat16>(b, step, feature);
      else if (side.factor.dtype == DType::float16)
        load_factor<float16>(b, step, feature);
      else
        load_factor<float>(b, step, feature);
#pragma unroll
      for (int m = 0; m < kProjectTiles; ++m) {
        if (m >= p.token_tiles) break;
        uint32_t a[3][4];
        load_terms<Z, false, false>(a, z + 16 * m * kPitch + feature, kPitch);
#pragma unroll
        for (int j = kMaxTerms - 1; j >= 0; --j) {  // small terms first
          if (j >= factor_terms) continue;
#pragma unroll
          for (int i = kTerms - 1; i >= 0; --i) {
            if (i + j >= kMaxTerms) continue;
            ptx::mma_m16n8k16<bfloat16>(sum[m][0], a[i], b[j][0], b[j][1]);
            ptx::mma_m16n8k16<bfloat16>(sum[m][1], a[i], b[j][2], b[j][3]);
          }
        }
      }
    }
  }

  // The sum over the warps that have the same ranks, as split terms to global memory.
  __device__ __forceinline__ void write(const Sum& sum) const {
    const int lane = threadIdx.x % kWarp, tokens = 16 * p.token_tiles;
    float* const sums = reinterpret_cast<float*>(ptx::dynamic_shared());  // [feature groups, rank groups, tokens, 16]
    float* const to = sums + (feature_group * rank_groups + rank_group) * tokens * 16;
#pragma unroll
    for (int m = 0; m < kProjectTiles; ++m) {
      if (m >= p.token_tiles) break;
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          ptx::store_shared(reinterpret_cast<float2*>(to + sum_place(16 * m + lane / 4 + 8 * h, 8 * n + lane % 4 * 2)),
                            make_float2(sum[m][n][2 * h], sum[m][n][2 * h + 1]));
    }
    __syncthreads();
    for (int task = threadIdx.x; task < tokens * p.width / 4; task += kLorsWarps * kWarp) {
      const int group = task / (4 * tokens), token = task / 4 % tokens, rank = task % 4 * 4;
      if (token >= tile.rows) continue;
      float4 value = add_warps(sums + group * tokens * 16 + sum_place(token, rank), feature_groups, rank_groups * tokens * 16);
      uint16_t* out = side.projected + int64_t{tile.first + token} * p.width + 16 * group + rank;
      for (int term = 0; term < side.terms; ++term, out += p.tokens * p.width) {
        const uint32_t low = next_term_pair(value.x, value.y);
        ptx::store_global(reinterpret_cast<uint2*>(out), make_uint2(low, next_term_pair(value.z, value.w)));
      }
    }
  }
};

template <typename Z>
__global__ void __launch_bounds__(kLorsWarps* kWarp, 2) project_kernel(const __grid_constant__ ProjectProblem p) {
  using Block = ProjectBlock<Z>;
  const Block block(p);
  if (!block.has_tokens()) return;
  typename Block::Sum sum = {};
  const int steps = static_cast<int>((block.side.features + kProjectFeatures - 1) / kProjectFeatures);
#pragma unroll 1
  for (int step = 0; step < Block::kStages - 1; ++step) block.copy(step);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<Block::kStages - 2>();
    __syncthreads();  // this step has arrived, and the stage that the next copy overwrites has been read
    block.copy(step + Block::kStages - 1);
    block.multiply(sum, step);
  }
  __syncthreads();  // every stage has been read, and no copy is on its way
  block.write(sum);
}

// ---- the gradients ----------------------------------------------------------------------------------------------------------

template <typename Z>
struct GradientBlock {
  static constexpr int kTerms = split_terms(dtype_of<Z>()), kStages = lors_stages(sizeof(Z));
  using Sum = float[4][2][4];  // [m][n]: 16 features from 16 m of the warp's 64, 8 ranks from 8 n of its 16

  const GradientProblem& p;
  const GradientSide& side;
  int64_t first_token, first_feature;
  int expert, range, tokens;  // of the block's range
  int rank_group, feature_group, token_group;

  __device__ __forceinline__ explicit GradientBlock(const GradientProblem& problem)
      : p(problem), side(problem.side[blockIdx.x >= problem.blocks]) {
    const int64_t block = blockIdx.x - (blockIdx.x >= p.blocks ? p.blocks : 0);
    const int warp = threadIdx.x / kWarp, rank_groups = p.width / 16;
    const int64_t tiles = side.tiles * p.experts.count;
    set_place(static_cast<int>(block / tiles), block % tiles);
    rank_group = warp % rank_groups;
    feature_group = warp / rank_groups % p.feature_groups;
    token_group = warp / rank_groups / p.feature_groups;
  }

  // `tile`: of all experts.
  __device__ __forceinline__ void set_place(int of_range, int64_t tile) {
    range = of_range;
    expert = static_cast<int>(tile / side.tiles);
    tile %= side.tiles;
    int64_t begin = 0, end = p.tokens;
    if (p.experts.offsets) {
      begin = p.experts.begin(expert, static_cast<int>(p.tokens));
      end = p.experts.end(expert, static_cast<int>(p.tokens));
    }
    first_token = begin + int64_t{range} * p.range_tokens;
    const int64_t left = end - first_token;
    tokens = static_cast<int>(left < p.range_tokens ? left : p.range_tokens);
    first_feature = tile * (64 * p.feature_groups);
  }

  __device__ __forceinline__ int steps() const { return (tokens + p.step_tokens - 1) / p.step_tokens; }
  __device__ __forceinline__ uint8_t* stage(int step) const { return ptx::dynamic_shared() + step % kStages * p.stage; }

  __device__ __forceinline__ void copy(int step) const {
    const int done = step * p.step_tokens, left = tokens - done;
    if (left > 0) {
      const int64_t token = first_token + done;
      constexpr int kShift = sizeof(Z) == 4 ? 4 : 3;  // of 64 elements
      copy_tile<false>(reinterpret_cast<Z*>(stage(step)), p.pitch, p.step_tokens, kShift + p.feature_groups - 1,
                       static_cast<const Z*>(side.z) + (side.gather ? 0 : token * side.features) + first_feature, left,
                       side.features - first_feature, side.features, side.z_vectors,
                       side.gather ? side.gather + token : nullptr);
      bfloat16* to = reinterpret_cast<bfloat16*>(stage(step) + p.terms_at);
      const bfloat16* from = reinterpret_cast<const bfloat16*>(side.projected) + token * p.width;
      for (int term = 0; term < side.terms; ++term, to += p.step_tokens * p.terms_pitch, from += p.tokens * p.width)
        copy_tile<true>(to, p.terms_pitch, p.step_tokens, __ffs(p.width / 8) - 1, from, left, p.width, p.width, true);
    }
    ptx::cp_async_commit();
  }

  // total += Z^T projected of the step. Sixteen tokens have a sum of their own, small terms first: the total is then rounded
  // once per sixteen tokens, and to nearest, which tensor cores do not promise.
  template <int kTokenTerms>
  __device__ __forceinline__ void multiply(Sum& total, int step) const {
    const int features = 64 * feature_group, ranks = 16 * rank_group;
#pragma unroll 1
    for (int token = 16 * token_group; token < p.step_tokens; token += 16 * p.token_groups) {
      const Z* const z = reinterpret_cast<const Z*>(stage(step)) + token * p.pitch + features;
      const bfloat16* const terms = reinterpret_cast<const bfloat16*>(stage(step) + p.terms_at) + token * p.terms_pitch + ranks;
      uint32_t b[kTokenTerms][3][4];
#pragma unroll
      for (int j = 0; j < kTokenTerms; ++j)
        load_terms<bfloat16, true, false>(b[j], terms + j * p.step_tokens * p.terms_pitch, p.terms_pitch);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        uint32_t a[3][4];
        load_terms<Z, true, true>(a, z + 16 * m, p.pitch);
        float sum[2][4];
        bool first = true;
#pragma unroll
        for (int order = kMaxTerms - 1; order >= 0; --order)
#pragma unroll
          for (int i = 0; i < kTerms; ++i) {
            const int j = order - i;
            if (j < 0 || j >= kTokenTerms) continue;
#pragma unroll
            for (int n = 0; n < 2; ++n) {
              if (first)
                ptx::mma_m16n8k16_zero<bfloat16>(sum[n], a[i], b[j][0][2 * n], b[j][0][2 * n + 1]);
              else
                ptx::mma_m16n8k16<bfloat16>(sum[n], a[i], b[j][0][2 * n], b[j][0][2 * n + 1]);
            }
            first = false;
          }
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) total[m][n][i] += sum[n][i];
      }
    }
  }

  // The warps' sums to shared memory, [token groups, feature groups, rank groups].
  __device__ __forceinline__ void put_sums(const Sum& total) const {
    const int lane = threadIdx.x % kWarp;
    float* const to = reinterpret_cast<float*>(ptx::dynamic_shared()) + threadIdx.x / kWarp * kLorsWarpSums;
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int feature = 16 * m + lane / 4 + 8 * h, rank = 8 * n + lane % 4 * 2;
          if (side.transposed) {
            ptx::store_shared(to + rank * kLorsTransposedPitch + feature, total[m][n][2 * h]);
            ptx::store_shared(to + (rank + 1) * kLorsTransposedPitch + feature, total[m][n][2 * h + 1]);
          } else {
            ptx::store_shared(reinterpret_cast<float2*>(to + sum_place(feature, rank)),
                              make_float2(total[m][n][2 * h], total[m][n][2 * h + 1]));
          }
        }
  }

  // Four neighbours of the block's result: where the first token group has their sum, and where they go.
  struct SumPlace {
    float* from;
    int64_t row, column;
    bool inside;
  };
  __device__ __forceinline__ int sum_groups() const { return p.width / 16 * p.feature_groups; }
  __device__ __forceinline__ int sum_tasks() const { return sum_groups() * 256; }
  __device__ __forceinline__ SumPlace sum_place_of(int task) const {
    const int group = task / 256, fours = side.transposed ? 16 : 4, rank_groups = p.width / 16;
    const int row = task % 256 / fours, column = task % fours * 4;
    const int ranks = group % rank_groups * 16;
    const int64_t feature = first_feature + group / rank_groups * 64;
    SumPlace at;
    at.from = reinterpret_cast<float*>(ptx::dynamic_shared()) + group * kLorsWarpSums +
              (side.transposed ? row * kLorsTransposedPitch + column : sum_place(row, column));
    at.row = row + (side.transposed ? ranks : feature);
    at.column = column + (side.transposed ? feature : ranks);
    at.inside = at.row < side.sums.rows && at.column < side.sums.columns;
    return at;
  }
  __device__ __forceinline__ float4 add_sums(const SumPlace& at) const {
    return add_warps(at.from, p.token_groups, sum_groups() * kLorsWarpSums);
  }

  // The sum over the warps that have the same features and ranks, to the partial sums or to the result.
  __device__ __forceinline__ void write(const Sum& total) const {
    put_sums(total);
    __syncthreads();
    const int64_t size = side.sums.rows * side.sums.width;
    for (int task = threadIdx.x; task < sum_tasks(); task += blockDim.x) {
      const SumPlace at = sum_place_of(task);
      if (!at.inside) continue;
      const float4 value = add_sums(at);
      if (side.partials) {
        ptx::store_global(
            reinterpret_cast<float4*>(side.partials + int64_t{range} * size + at.row * side.sums.width + at.column), value);
      } else {
        float four[4] = {value.x, value.y, value.z, value.w};
        store_result(side.sums, expert * side.expert_rows + at.row, at.column, four);
      }
    }
  }
};

template <typename Z>
__global__ void __launch_bounds__(kLorsWarps* kWarp, 2) gradient_kernel(const __grid_constant__ GradientProblem p) {
  using Block = GradientBlock<Z>;
  const Block block(p);
  typename Block::Sum total = {};
  const int steps = block.steps();
#pragma unroll 1
  for (int step = 0; step < Block::kStages - 1; ++step) block.copy(step);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<Block::kStages - 2>();
    __syncthreads();  // this step has arrived, and the stage that the next copy overwrites has been read
    block.copy(step + Block::kStages - 1);
    if (Block::kTerms < 3 && block.side.terms == 2)
      block.template multiply<2>(total, step);
    else
      block.template multiply<3>(total, step);
  }
  __syncthreads();  // every stage has been read, and no copy is on its way
  block.write(total);
}

}  // namespace lors::cuda
