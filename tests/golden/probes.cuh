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
                                         "roundings"};
// Whether the order of additions is up to the hardware, so that outputs agree within rounding and not bit for bit.
constexpr bool kSums[kProbes] = {false, false, true, true, false, false, false, false, false};

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
      probe_kernel<kLdmatrix>,   probe_kernel<kLdmatrixTrans>, probe_kernel<kMmaBfloat16>,
      probe_kernel<kMmaFloat16>, probe_kernel<kCpAsync>,       probe_kernel<kLoadGlobalOnce>,
      probe_kernel<kShuffles>,   probe_kernel<kVotes>,         probe_kernel<kRoundings>};
  return cuda::launch(kNames[probe], kernels[probe], dim3(1), dim3(kLanes), kSharedBytes, host, in, out);
}

}  // namespace lors::golden
