// SPDX-License-Identifier: Apache-2.0
// gradient_kernel of adapter_grad_lors.cuh for devices with clusters: gradient[f, p] = s sum_t Z[t, f] projected[t, p]. The
// ranges of tokens of the same features form a cluster. Each block copies whole rows by bulk copies, an mbarrier per stage, and
// at the end the blocks add up their sums through distributed shared memory, in the order of the ranges: no partial sums, and
// no launch that adds them up. bfloat16 dY and X with aligned rows (gradients_in_clusters).
#pragma once

#include "adapter_grad_lors.cuh"

namespace lors::cuda {

struct ClusterGradientBlock : GradientBlock<bfloat16> {
  uint32_t mbarriers;  // their shared address, one for each stage

  __device__ __forceinline__ ClusterGradientBlock(const GradientProblem& problem, int mbarriers_at) : GradientBlock(problem) {
    const unsigned block = blockIdx.x - (blockIdx.x >= p.blocks ? p.blocks : 0);
    set_place(static_cast<int>(ptx::cluster_rank()), block / ptx::cluster_size());
    mbarriers = ptx::shared_address(ptx::dynamic_shared()) + static_cast<uint32_t>(mbarriers_at);
  }

  __device__ __forceinline__ bfloat16* z_row(int stage_of, int row) const {
    return reinterpret_cast<bfloat16*>(stage(stage_of)) + row * p.pitch;
  }
  __device__ __forceinline__ bfloat16* terms_row(int stage_of, int term, int row) const {
    return reinterpret_cast<bfloat16*>(stage(stage_of) + p.terms_at) + (term * p.step_tokens + row) * p.terms_pitch;
  }
  __device__ __forceinline__ int columns() const {  // of the tile that Z has
    const int64_t left = side.features - first_feature;
    return left < 64 * p.feature_groups ? static_cast<int>(left) : 64 * p.feature_groups;
  }
  __device__ __forceinline__ static void clear(bfloat16* from, int elements) {
    for (int i = 0; i < elements; i += 8) ptx::store_shared(reinterpret_cast<uint4*>(from + i), make_uint4(0, 0, 0, 0));
  }

  // Before the first copy: zeros in the columns that no copy writes, and the mbarriers, at which the lanes of a warp arrive.
  __device__ __forceinline__ void prepare() const {
    for (int row = threadIdx.x; row < kStages * p.step_tokens; row += blockDim.x)
      clear(z_row(row / p.step_tokens, row % p.step_tokens) + columns(), 64 * p.feature_groups - columns());
    if (threadIdx.x == 0) {
      for (uint32_t i = 0; i < kStages; ++i) ptx::mbarrier_init(mbarriers + 8 * i, kWarp);
      ptx::fence_mbarrier_init();
    }
    __syncthreads();
  }

  // The first warp starts copying a step, a lane every 32nd row; rows beyond the last token become zeros.
  __device__ __forceinline__ void copy(int step) const {
    const int done = step * p.step_tokens, left = tokens - done;
    if (left <= 0 || threadIdx.x >= kWarp) return;
    const int64_t token = first_token + done;
    const int rows = left < p.step_tokens ? left : p.step_tokens, lane = threadIdx.x;
    const uint32_t mbarrier = mbarriers + static_cast<uint32_t>(step % kStages) * 8;
    const uint32_t z_bytes = static_cast<uint32_t>(columns()) * 2, terms_bytes = static_cast<uint32_t>(p.width) * 2;
    for (int row = rows + lane; row < p.step_tokens; row += kWarp) {
      clear(z_row(step, row), columns());
      for (int term = 0; term < side.terms; ++term) clear(terms_row(step, term, row), p.width);
    }
    const uint32_t mine = lane < rows ? static_cast<uint32_t>((rows - lane + kWarp - 1) / kWarp) : 0;
    ptx::mbarrier_arrive_expect(mbarrier, mine * (z_bytes + static_cast<uint32_t>(side.terms) * terms_bytes));
    for (int row = lane; row < rows; row += kWarp) {
      const bfloat16* const z =
          static_cast<const bfloat16*>(side.z) + gathered(side.gather, token + row) * side.features + first_feature;
      ptx::copy_bulk(ptx::shared_address(z_row(step, row)), z, z_bytes, mbarrier);
      for (int term = 0; term < side.terms; ++term)
        ptx::copy_bulk(ptx::shared_address(terms_row(step, term, row)),
                       side.projected + (term * p.tokens + token + row) * p.width, terms_bytes, mbarrier);
    }
  }
  __device__ __forceinline__ void wait(int step) const {
    ptx::mbarrier_wait(mbarriers + static_cast<uint32_t>(step % kStages) * 8, static_cast<uint32_t>(step / kStages % 2));
  }

  // The sum over the cluster to the result; each block writes its part of it.
  __device__ __forceinline__ void write(const Sum& total) const {
    put_sums(total);
    __syncthreads();
    const int tasks = sum_tasks();
    for (int task = threadIdx.x; p.token_groups > 1 && task < tasks; task += blockDim.x) {
      const SumPlace at = sum_place_of(task);
      if (at.inside) ptx::store_shared(reinterpret_cast<float4*>(at.from), add_sums(at));
    }
    ptx::cluster_arrive();
    ptx::cluster_wait();
    const int blocks = static_cast<int>(ptx::cluster_size()), rank = static_cast<int>(ptx::cluster_rank());
    for (int task = threadIdx.x + rank * blockDim.x; task < tasks; task += blocks * blockDim.x) {
      const SumPlace at = sum_place_of(task);
      if (!at.inside) continue;
      float sum[4] = {};
      for (uint32_t of = 0; of < ptx::cluster_size(); ++of) {
        const float4 part = ptx::load_cluster(ptx::map_shared(ptx::shared_address(at.from), of));
        sum[0] += part.x;
        sum[1] += part.y;
        sum[2] += part.z;
        sum[3] += part.w;
      }
      store_result(side.sums, expert * side.expert_rows + at.row, at.column, sum);
    }
    ptx::cluster_arrive();  // no block ends while another reads its sums
    ptx::cluster_wait();
  }
};

__global__ void __launch_bounds__(kLorsWarps* kWarp, 2)
    cluster_gradient_kernel(const __grid_constant__ GradientProblem p, int mbarriers_at) {
  if constexpr (ptx::kClusters) {
    using Block = ClusterGradientBlock;
    const Block block(p, mbarriers_at);
    Block::Sum total = {};
    const int steps = block.steps();
    block.prepare();
#pragma unroll 1
    for (int step = 0; step < Block::kStages - 1; ++step) block.copy(step);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      block.wait(step);
      __syncthreads();  // the stage that the next copy overwrites has been read
      block.copy(step + Block::kStages - 1);
      if (block.side.terms == 2)
        block.template multiply<2>(total, step);
      else
        block.template multiply<3>(total, step);
    }
    __syncthreads();  // every stage has been read
    block.write(total);
  }
}

}  // namespace lors::cuda
