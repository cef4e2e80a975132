// SPDX-License-Identifier: Apache-2.0
// Adds up partial sums: the kernel of reduce.cuh's formula, and its launch.
#include "reduce.cuh"

#include <string>

namespace lors::cuda {

struct PartialSumsPair {
  PartialSums sums[2];
  unsigned blocks = 0;  // of the first
};

constexpr int kReduceThreads = 128;  // of one slice: four columns each
constexpr int kReduceMaxSlices = 8;  // slice s adds partials s, s + slices, ...

// One block: kReduceThreads neighbouring fours of the sums. blockDim.x = kReduceThreads * slices.
__global__ void __launch_bounds__(kReduceThreads* kReduceMaxSlices, 1)
    reduce_kernel(const __grid_constant__ PartialSumsPair pair) {
  const bool second = blockIdx.x >= pair.blocks;
  const PartialSums& p = pair.sums[second];
  const int slices = blockDim.x / kReduceThreads, slice = threadIdx.x / kReduceThreads, thread = threadIdx.x % kReduceThreads;
  const int64_t block = blockIdx.x - (second ? pair.blocks : 0);
  const int64_t at = (block * kReduceThreads + thread) * 4, size = p.rows * p.width;
  const int expert = at < size ? expert_of(p.experts, at / p.width) : -1;
  float sum[4] = {};
  const auto add = [&](const float4& part) {
    sum[0] += part.x;
    sum[1] += part.y;
    sum[2] += part.z;
    sum[3] += part.w;
  };
  if (expert >= 0) {
    const int64_t count = p.experts.offsets && expert == p.experts.count ? 0 : p.count;
    if (slice == 0 && p.bias.data != nullptr) {
      const int64_t column = at % p.width;
      float eight[8];
      load_eight(eight, p.bias, expert, column / 8 * 8);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = column % 8 ? eight[4 + i] : eight[i];
    }
    const float* from = p.partials + slice * size + at;
#pragma unroll 4
    for (int64_t i = slice; i < count; i += slices, from += slices * size)
      add(ptx::load_global(reinterpret_cast<const float4*>(from)));
  }
  float4* const parts = reinterpret_cast<float4*>(ptx::dynamic_shared()) + thread;
  if (slice > 0) ptx::store_shared(parts + (slice - 1) * kReduceThreads, make_float4(sum[0], sum[1], sum[2], sum[3]));
  __syncthreads();
  if (slice > 0) return;
  for (int other = 0; other < slices - 1; ++other) add(ptx::load_shared(parts + other * kReduceThreads));
  const int64_t row = at / p.width, column = at % p.width;
  if (expert >= 0 && column < p.columns) store_result(p, row, column, sum);
}

Status reduce_partials(std::initializer_list<PartialSums> all, const CudaHost& host) {
  PartialSumsPair pair;
  int64_t blocks[2] = {}, count = 0;
  int used = 0;
  for (PartialSums sums : all) {
    if (sums.rows == 0 || sums.columns == 0) continue;
    if (sums.add && sums.dtype != DType::float32)
      return Status::error("A sum of partial results is added to float32 only, and was asked to add to a 16-bit dtype.");
    sums.vectors = has_fours(sums);
    if (sums.count == 0) sums.width = (sums.columns + 3) / 4 * 4;
    blocks[used] = (sums.rows * sums.width + 4 * kReduceThreads - 1) / (4 * kReduceThreads);
    if (blocks[0] + blocks[1] > 0x7fffffff)
      return Status::error("A sum of [" + std::to_string(sums.rows) + ", " + std::to_string(sums.columns) +
                           "] takes more blocks than CUDA launches; split the call.");
    if (sums.count > count) count = sums.count;
    pair.sums[used++] = sums;
  }
  if (used == 0) return {};
  pair.blocks = static_cast<unsigned>(blocks[0]);
  int slices = 1;
  while (slices < kReduceMaxSlices && count > 4 * slices) slices *= 2;
  return launch("the sum of partial results", reduce_kernel, dim3(static_cast<unsigned>(blocks[0] + blocks[1])),
                dim3(static_cast<unsigned>(kReduceThreads * slices)),
                static_cast<int>(sizeof(float4)) * kReduceThreads * (slices - 1), host, pair);
}

}  // namespace lors::cuda
