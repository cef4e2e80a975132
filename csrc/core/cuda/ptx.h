// SPDX-License-Identifier: Apache-2.0
// All memory accesses and all inline assembly of the kernels; sm_80 instructions, but for those of clusters and bulk copies at
// the end, which sm_90 and sm_100 have; layouts as in the PTX ISA. Kernels access
// global and shared memory through these functions only, so that the simulator, which replaces them (LORS_SIM:
// tests/sim/include/ptx_sim.h), sees every access.
#pragma once

#ifdef LORS_SIM
#include "ptx_sim.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <lors/cuda_device.h>

#include <cstdint>
#include <type_traits>

namespace lors::ptx {

// The block's dynamic shared memory, aligned to 1024 bytes. Kernels use no static __shared__.
__device__ __forceinline__ uint8_t* dynamic_shared() {
  extern __shared__ __align__(1024) uint8_t lors_dynamic_shared[];
  return lors_dynamic_shared;
}

// The 32-bit address that cp_async_16 and ldmatrix take.
__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// One access of sizeof(T) = 1, 2, 4, 8 or 16 bytes, aligned to its size.
template <typename T>
__device__ __forceinline__ T load_global(const T* p) {
  return *p;
}
// For data that is read once and never written by this kernel: bypasses the L1 cache.
__device__ __forceinline__ uint4 load_global_once(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
template <typename T>
__device__ __forceinline__ void store_global(T* p, T v) {
  *p = v;
}
// One load or store of 8 or 16 bytes where number > limit, without a branch; else v stays. 16 bytes are loaded as by
// load_global_once.
__device__ __forceinline__ void load_global_if(int number, int limit, uint4& v, const uint4* p) {
  asm volatile(
      "{\n.reg .pred wanted;\nsetp.gt.s32 wanted, %5, %6;\n"
      "@wanted ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n}\n"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(p), "r"(number), "r"(limit));
}
__device__ __forceinline__ void load_global_if(int number, int limit, uint2& v, const uint2* p) {
  asm volatile("{\n.reg .pred wanted;\nsetp.gt.s32 wanted, %3, %4;\n@wanted ld.global.v2.u32 {%0, %1}, [%2];\n}\n"
               : "+r"(v.x), "+r"(v.y)
               : "l"(p), "r"(number), "r"(limit)
               : "memory");
}
__device__ __forceinline__ void store_global_if(int number, int limit, uint4* p, const uint4& v) {
  asm volatile(
      "{\n.reg .pred wanted;\nsetp.gt.s32 wanted, %5, %6;\n@wanted st.global.v4.u32 [%4], {%0, %1, %2, %3};\n}\n" ::"r"(v.x),
      "r"(v.y), "r"(v.z), "r"(v.w), "l"(p), "r"(number), "r"(limit)
      : "memory");
}
__device__ __forceinline__ void store_global_if(int number, int limit, uint2* p, const uint2& v) {
  asm volatile("{\n.reg .pred wanted;\nsetp.gt.s32 wanted, %3, %4;\n@wanted st.global.v2.u32 [%2], {%0, %1};\n}\n" ::"r"(v.x),
               "r"(v.y), "l"(p), "r"(number), "r"(limit)
               : "memory");
}
template <typename T>
__device__ __forceinline__ T load_shared(const T* p) {
  return *p;
}
template <typename T>
__device__ __forceinline__ void store_shared(T* p, T v) {
  *p = v;
}

// Four bytes of the eight of (high, low): nibble i of `selector`, 0 to 7, says which becomes byte i. __byte_perm without a
// mask.
__device__ __forceinline__ uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t picked;
  asm("prmt.b32 %0, %1, %2, %3;\n" : "=r"(picked) : "r"(low), "r"(high), "r"(selector));
  return picked;
}

// Starts a copy of 16 bytes from global to shared memory; bytes from src_bytes (0 to 16) on are written as zero, and with
// src_bytes = 0 nothing is read. src and dst are aligned to 16.
__device__ __forceinline__ void cp_async_16(uint32_t dst, const void* src, int src_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(dst), "l"(src), "r"(src_bytes) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most `Pending` of this thread's groups are in flight. Other threads' copies need a barrier as well.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
}

// Four 8x8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8 and receives, of each matrix i,
// elements [l / 4][2 (l % 4)] and [l / 4][2 (l % 4) + 1] in r[i]; _trans: of the transposed matrix.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// c[16 x 8] += a[16 x 16] b[16 x 8] in float32; T is __nv_bfloat16 or __half. With g = lane / 4 and t = lane % 4:
//   a[0] = A[g][2t, 2t+1]    a[1] = A[g+8][2t, 2t+1]    a[2] = A[g][2t+8, 2t+9]    a[3] = A[g+8][2t+8, 2t+9]
//   b0 = B[2t, 2t+1][g]      b1 = B[2t+8, 2t+9][g]      c = C[g][2t], C[g][2t+1], C[g+8][2t], C[g+8][2t+1]
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}
// The same with c = 0: c = a b.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16_zero(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, __nv_bfloat16>);
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %10, %10, %10};\n"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));
}

// Whether this compilation is for an architecture that has the rest of this file.
#ifdef __CUDA_ARCH__
constexpr bool kClusters = cuda::has_clusters(__CUDA_ARCH__ / 10);
#else
constexpr bool kClusters = false;
#endif

// Of this block in its cluster, and the number of its blocks.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;\n" : "=r"(size));
  return size;
}
// The barrier of the cluster, in two halves; kernels call each with whole warps, as the simulator demands. What a thread did
// before it arrives is seen by every thread of the cluster that has waited.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;\n" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;\n" ::: "memory"); }

// The address of the same place in the shared memory of block `rank` of the cluster, for load_cluster and store_cluster. That
// block must have started, and may not end before the access: a barrier of the cluster before and after.
__device__ __forceinline__ uint32_t map_shared(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}
__device__ __forceinline__ float4 load_cluster(uint32_t address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];\n"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ void store_cluster(uint32_t address, const float4& v) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
}

// An mbarrier, 8 bytes of shared memory: a phase is complete when `count` threads have arrived and all expected bytes have
// come. One thread initialises it, calls fence_mbarrier_init, and then all meet in __syncthreads.
__device__ __forceinline__ void mbarrier_init(uint32_t mbarrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(mbarrier), "r"(count) : "memory");
}
__device__ __forceinline__ void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory"); }
__device__ __forceinline__ void mbarrier_arrive(uint32_t mbarrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(mbarrier) : "memory");
}
// Arrives and lets the phase wait for so many bytes of bulk copies.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t mbarrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(mbarrier), "r"(bytes) : "memory");
}
// Waits until the phase with this parity is complete: 0 for the first phase, 1 for the second, 0 for the third, ...
__device__ __forceinline__ void mbarrier_wait(uint32_t mbarrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}\n" ::"r"(
          mbarrier),
      "r"(parity)
      : "memory");
}
// Starts a copy of `bytes` consecutive bytes from global to shared memory, whose end the mbarrier is told. All three are
// multiples of 16. No ordinary store may have written dst before (that would need a fence between the proxies).
__device__ __forceinline__ void copy_bulk(uint32_t dst, const void* src, uint32_t bytes, uint32_t mbarrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(dst), "l"(src),
               "r"(bytes), "r"(mbarrier)
               : "memory");
}

}  // namespace lors::ptx
#endif

namespace lors::ptx {

// Two e4m3 codes, the lower byte first, as float32. From compute capability 8.9 on there is an instruction; elsewhere, and on
// the simulator, their exponents and significands are those of a float16 2^8 times as large.
__device__ __forceinline__ float2 e4m3_values(uint32_t codes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;\n" : "=r"(halves) : "h"(static_cast<uint16_t>(codes)));
  return make_float2(__half2float(__ushort_as_half(static_cast<unsigned short>(halves))),
                     __half2float(__ushort_as_half(static_cast<unsigned short>(halves >> 16))));
#else
  const auto value = [](uint32_t code) {
    const uint32_t half = (code & 0x7f) == 0x7f ? 0x7fff : (code & 0x80) << 8 | (code & 0x7f) << 7;
    return 256.f * __half2float(__ushort_as_half(static_cast<unsigned short>(half)));
  };
  return make_float2(value(codes & 0xff), value(codes >> 8 & 0xff));
#endif
}

}  // namespace lors::ptx
