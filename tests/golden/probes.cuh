// SPDX-License-Identifier: Apache-2.0
// One-warp probes of every instruction in ptx.h. The same source runs on a GPU, whose results record.cu writes, and on the
// simulator, which must give the same: this detects fragment layouts that kernels and simulator misread alike.
#pragma once

#include "launch.h"
#include "operands.cuh"
#include "ptx.h"

namespace lors::golden {

using cuda::bfloat16;
using cuda::float16;

constexpr int kLanes = 32, kInputs = 16, kOutputs = 8;  // 32-bit words per lane
constexpr int kSharedBytes = 4 * kLanes * kInputs;

enum Probe {
  kLdmatrix,
  kLdmatrixTrans,
  kMmaBfloat16,
  kMmaFloat16,
  kCpAsync,
  kLoadGlobalOnce,
  kShuffles,
  kVotes,
  kRoundings,
  kMmaZero,
  kPickBytes,
  kLoadIf,
  kStoreIf,
  kBulkCopy,
  kCluster,
  kProbes,
};

constexpr const char* kNames[kProbes] = {"ldmatrix_x4",
                                         "ldmatrix_x4_trans",
                                         "mma_m16n8k16_bfloat16",
                                         "mma_m16n8k16_float16",
                                         "cp_async_16",
                                         "load_global_once",
                                         "shuffles",
                                         "votes",
                                         "roundings",
                                         "mma_m16n8k16_zero_bfloat16",
                                         "pick_bytes",
                                         "load_global_if",
                                         "store_global_if",
                                         "bulk_copy",
                                         "cluster"};
// Whether the order of additions is up to the hardware, so that outputs agree within rounding and not bit for bit.
constexpr bool kSums[kProbes] = {false, false, true,  true,  false, false, false, false,
                                 false, true,  false, false, false, false, false};
// Which devices have the instructions (has_clusters).
constexpr bool needs_clusters(int probe) { return probe == kBulkCopy || probe == kCluster; }

// in: [32 lanes][16]; out: [32 lanes][8]
template <int kProbe>
__global__ void __launch_bounds__(kLanes) probe_kernel(const uint32_t* in, uint32_t* out) {
  const int lane = threadIdx.x;
  uint32_t x[kInputs], y[kOutputs] = {};
#pragma unroll
  for (int i = 0; i < kInputs; ++i) x[i] = ptx::load_global(in + lane * kInputs + i);
  uint32_t* const shared = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());

  if constexpr (kProbe == kLdmatrix || kProbe == kLdmatrixTrans) {
#pragma unroll
    for (int i = 0; i < kInputs; ++i) ptx::store_shared(shared + lane * kInputs + i, x[i]);
    __syncthreads();
    // 128 rows of 16 bytes; every lane gives the address of a different one, in scrambled order.
    const uint32_t row = ptx::shared_address(shared + (lane * 37 + 11) % 128 * 4);
    uint32_t r[4];
    if constexpr (kProbe == kLdmatrix)
      ptx::ldmatrix_x4(r, row);
    else
      ptx::ldmatrix_x4_trans(r, row);
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = r[i];
  } else if constexpr (kProbe == kMmaBfloat16 || kProbe == kMmaFloat16) {
    using T = std::conditional_t<kProbe == kMmaBfloat16, bfloat16, float16>;
    const uint32_t a[4] = {x[0], x[1], x[2], x[3]};
    float c[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] = __uint_as_float(x[8 + i]);
    ptx::mma_m16n8k16<T>(c, a, x[4], x[5]);
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = __float_as_uint(c[i]);
  } else if constexpr (kProbe == kMmaZero) {
    const uint32_t a[4] = {x[0], x[1], x[2], x[3]};
    float c[4] = {1.f, 2.f, 3.f, 4.f};  // without effect
    ptx::mma_m16n8k16_zero<bfloat16>(c, a, x[4], x[5]);
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = __float_as_uint(c[i]);
  } else if constexpr (kProbe == kPickBytes) {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) y[i] = ptx::pick_bytes(x[i], x[(i + 1) % 8], x[(i + 2) % 8] & 0x7777u);
  } else if constexpr (kProbe == kLoadIf) {
    uint4 v = make_uint4(x[0], x[1], x[2], x[3]);
    uint2 w = make_uint2(x[4], x[5]);
    ptx::load_global_if(lane, 15, v, reinterpret_cast<const uint4*>(in + (kLanes - 1 - lane) * kInputs + 8));
    ptx::load_global_if(lane % 5, 1, w, reinterpret_cast<const uint2*>(in + (kLanes - 1 - lane) * kInputs + 14));
    y[0] = v.x, y[1] = v.y, y[2] = v.z, y[3] = v.w, y[4] = w.x, y[5] = w.y;
  } else if constexpr (kProbe == kStoreIf) {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) ptx::store_global(out + lane * kOutputs + i, x[8 + i]);
    ptx::store_global_if(lane % 3, 0, reinterpret_cast<uint4*>(out + lane * kOutputs), make_uint4(x[0], x[1], x[2], x[3]));
    ptx::store_global_if(lane % 5, 1, reinterpret_cast<uint2*>(out + lane * kOutputs + 4), make_uint2(x[4], x[5]));
  } else if constexpr (kProbe == kBulkCopy && ptx::kClusters) {
    // Phase 0: even lanes copy 32 bytes of the lane opposite; phase 1: odd lanes 16 bytes of their own.
    uint32_t* const mine = shared + lane * 8;
    const uint32_t mbarrier = ptx::shared_address(shared + kLanes * 8), even = lane / 2 * 2;
    if (lane == 0) {
      ptx::mbarrier_init(mbarrier, kLanes);
      ptx::fence_mbarrier_init();
    }
    __syncthreads();
    for (int phase = 0; phase < 2; ++phase) {
      if (lane % 2 == phase) {
        const uint32_t bytes = phase == 0 ? 32 : 16;
        ptx::mbarrier_arrive_expect(mbarrier, bytes);
        ptx::copy_bulk(ptx::shared_address(mine), phase == 0 ? in + (kLanes - 1 - lane) * kInputs : in + lane * kInputs + 8,
                       bytes, mbarrier);
      } else {
        ptx::mbarrier_arrive(mbarrier);
      }
      ptx::mbarrier_wait(mbarrier, static_cast<uint32_t>(phase));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      y[i] = ptx::load_shared(shared + even * 8 + lane % 2 * 4 + i);
      y[4 + i] = ptx::load_shared(shared + (even + 1) * 8 + i);
    }
  } else if constexpr (kProbe == kCluster && ptx::kClusters) {
    // Two blocks: block 0 reads what block 1 has stored in its shared memory, and block 1 stores to block 0's.
    float4* const mine = reinterpret_cast<float4*>(shared) + 2 * lane;
    const uint32_t rank = ptx::cluster_rank(), opposite = ptx::shared_address(mine - 2 * lane + 2 * (kLanes - 1 - lane));
    const auto values = [&](int i) {
      return make_float4(__uint_as_float(x[i]), __uint_as_float(x[i + 1]), __uint_as_float(x[i + 2]),
                         __uint_as_float(x[i + 3]));
    };
    ptx::store_shared(mine, values(rank == 0 ? 4 : 8));
    ptx::cluster_arrive();
    ptx::cluster_wait();
    const float4 read = ptx::load_cluster(ptx::map_shared(opposite, 1));
    if (rank == 1) ptx::store_cluster(ptx::map_shared(opposite + 16, 0), values(12));
    ptx::cluster_arrive();
    ptx::cluster_wait();
    if (rank != 0) return;
    const float4 stored = ptx::load_shared(mine + 1);
    y[0] = __float_as_uint(read.x), y[1] = __float_as_uint(read.y), y[2] = __float_as_uint(read.z);
    y[3] = __float_as_uint(read.w), y[4] = __float_as_uint(stored.x), y[5] = __float_as_uint(stored.y);
    y[6] = __float_as_uint(stored.z), y[7] = ptx::cluster_size();
  } else if constexpr (kProbe == kCpAsync) {
    // Lane l copies l % 17 bytes of its own 16; the rest must become zero.
#pragma unroll
    for (int i = 0; i < 4; ++i) ptx::store_shared(shared + lane * 4 + i, 0xffffffffu);
    __syncthreads();
    ptx::cp_async_16(ptx::shared_address(shared + lane * 4), in + lane * kInputs, lane % 17);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = ptx::load_shared(shared + (lane + 1) % kLanes * 4 + i);
  } else if constexpr (kProbe == kLoadGlobalOnce) {
    const uint4 v = ptx::load_global_once(reinterpret_cast<const uint4*>(in + (kLanes - 1 - lane) * kInputs + 4));
    y[0] = v.x, y[1] = v.y, y[2] = v.z, y[3] = v.w;
  } else if constexpr (kProbe == kShuffles) {
    y[0] = __shfl_xor_sync(0xffffffffu, x[0], 5);
    y[1] = __shfl_sync(0xffffffffu, x[1], static_cast<int>(x[2] % 32));
    y[2] = __shfl_down_sync(0xffffffffu, x[3], 3);
    y[3] = __shfl_up_sync(0xffffffffu, x[4], 7);
    y[4] = __shfl_xor_sync(0xffffffffu, x[5], 3, 8);
  } else if constexpr (kProbe == kVotes) {
    y[0] = __ballot_sync(0xffffffffu, static_cast<int>(x[0] & 1));
    y[1] = static_cast<uint32_t>(__any_sync(0xffffffffu, lane == 19) != 0);
    y[2] = static_cast<uint32_t>(__all_sync(0xffffffffu, lane != 19) != 0);
    y[3] = static_cast<uint32_t>(__popc(x[1]));
  } else if constexpr (kProbe == kRoundings) {
    // Random bits, with NaNs, infinities and subnormals. A NaN's payload is not specified.
    const auto defined = [](float value, uint32_t bits) { return value == value ? bits : 0x7fc07fc0u; };
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float value = __uint_as_float(x[i]);
      y[2 * i] = defined(value, cuda::bits_of(cuda::from_float<bfloat16>(value)));
      y[2 * i + 1] = defined(value, cuda::bits_of(cuda::from_float<float16>(value)));
    }
    const float half = cuda::to_float(cuda::from_float<float16>(__uint_as_float(x[2])));
    y[4] = defined(half, __float_as_uint(half));
    const float a = __uint_as_float(x[8]), b = __uint_as_float(x[9]), c = __uint_as_float(x[10]);
    y[5] = __float_as_uint(fmaf(a, b, c));
  }
  if constexpr (kProbe != kStoreIf)
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) ptx::store_global(out + lane * kOutputs + i, y[i]);
}

// Random bits; for the sums, pairs of 16-bit numbers and float32 numbers of moderate size.
inline void make_inputs(int probe, uint32_t seed, uint32_t* in) {
  uint64_t state = (uint64_t{seed} << 32 | static_cast<uint32_t>(probe)) * 0x9e3779b97f4a7c15ull + 1;
  const auto random = [&] {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return static_cast<uint32_t>(state >> 16);
  };
  const auto sixteen = [&](uint32_t bits) {  // exponents of 2^-3 to 2^4
    return probe == kMmaFloat16 ? (bits & 0x83ffu) | (12 + (bits >> 12 & 7)) << 10
                                : (bits & 0x807fu) | (124 + (bits >> 8 & 7)) << 7;
  };
  for (int i = 0; i < kLanes * kInputs; ++i) {
    const uint32_t bits = random();
    if (kSums[probe] && i % kInputs < 8)
      in[i] = sixteen(bits & 0xffff) | sixteen(bits >> 16) << 16;
    else if (i % kInputs >= 8)
      in[i] = (bits & 0x807fffffu) | (125 + (bits >> 24 & 3)) << 23;
    else
      in[i] = bits;
  }
}

inline Status run_probe(int probe, const uint32_t* in, uint32_t* out, const CudaHost& host) {
  void (*const kernels[kProbes])(const uint32_t*, uint32_t*) = {
      probe_kernel<kLdmatrix>,  probe_kernel<kLdmatrixTrans>,  probe_kernel<kMmaBfloat16>, probe_kernel<kMmaFloat16>,
      probe_kernel<kCpAsync>,   probe_kernel<kLoadGlobalOnce>, probe_kernel<kShuffles>,    probe_kernel<kVotes>,
      probe_kernel<kRoundings>, probe_kernel<kMmaZero>,        probe_kernel<kPickBytes>,   probe_kernel<kLoadIf>,
      probe_kernel<kStoreIf>,   probe_kernel<kBulkCopy>,       probe_kernel<kCluster>};
  const unsigned blocks = probe == kCluster ? 2 : 1;
  return cuda::launch(kNames[probe], kernels[probe], {dim3(blocks), blocks}, dim3(kLanes), kSharedBytes, host, in, out);
}

}  // namespace lors::golden
