// SPDX-License-Identifier: Apache-2.0
// CUDA's built-ins for g++: what a kernel may use besides ptx.h. Number types come from NVIDIA's headers, whose host side is
// ordinary C++; this file has what those headers leave to nvcc.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "sim.h"

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __shared__
#undef __constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// Accesses to either could not be checked: a kernel that uses one does not compile here.
#define __shared__ static_shared_memory_is_not_simulated_use_ptx_dynamic_shared
#define __constant__ constant_memory_is_not_simulated

#define threadIdx (::lors::sim::coordinates->thread)
#define blockIdx (::lors::sim::coordinates->block)
#define blockDim (::lors::sim::coordinates->block_size)
#define gridDim (::lors::sim::coordinates->grid_size)
#define warpSize 32

// ---- synchronisation ----
inline void __syncthreads(lors::sim::Site site = lors::sim::Site::current()) { lors::sim::block_barrier(site); }
inline void __syncwarp(uint32_t mask = ~0u, lors::sim::Site site = lors::sim::Site::current()) {
  lors::sim::collective("__syncwarp", mask, nullptr, nullptr, site);
}
// Threads of one block run one at a time, and blocks one after another: there is nothing to order.
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap(lors::sim::Site site = lors::sim::Site::current()) { lors::sim::fail(site, "__trap"); }

// ---- warp collectives ----
namespace lors::sim {
template <typename T>
T shuffled(const char* name, uint32_t mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  ShuffleOperand operand{0, source, 0};
  std::memcpy(&operand.value, &value, sizeof(T));
  collective(name, mask, &operand, shuffle, site);
  std::memcpy(&value, &operand.result, sizeof(T));
  return value;
}
inline uint32_t voted(const char* name, uint32_t mask, bool vote, Site site) {
  VoteOperand operand{vote, 0};
  collective(name, mask, &operand, ballot, site);
  return operand.ballot;
}
// The first lane of the running lane's segment of `width` lanes.
inline int segment(int width) { return lane() & ~(width - 1); }
}  // namespace lors::sim

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, lors::sim::Site site = lors::sim::Site::current()) {
  return lors::sim::shuffled("__shfl_sync", mask, value, lors::sim::segment(width) | (source & (width - 1)), site);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, lors::sim::Site site = lors::sim::Site::current()) {
  const int lane = lors::sim::lane(), source = lane ^ bits;
  const bool inside = source < lors::sim::segment(width) + width;
  return lors::sim::shuffled("__shfl_xor_sync", mask, value, inside ? source : lane, site);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, lors::sim::Site site = lors::sim::Site::current()) {
  const int lane = lors::sim::lane(), source = lane + static_cast<int>(delta);
  const bool inside = source < lors::sim::segment(width) + width;
  return lors::sim::shuffled("__shfl_down_sync", mask, value, inside ? source : lane, site);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, lors::sim::Site site = lors::sim::Site::current()) {
  const int lane = lors::sim::lane(), source = lane - static_cast<int>(delta);
  return lors::sim::shuffled("__shfl_up_sync", mask, value, source >= lors::sim::segment(width) ? source : lane, site);
}
inline uint32_t __ballot_sync(uint32_t mask, int vote, lors::sim::Site site = lors::sim::Site::current()) {
  return lors::sim::voted("__ballot_sync", mask, vote != 0, site);
}
inline int __any_sync(uint32_t mask, int vote, lors::sim::Site site = lors::sim::Site::current()) {
  return lors::sim::voted("__any_sync", mask, vote != 0, site) != 0;
}
inline int __all_sync(uint32_t mask, int vote, lors::sim::Site site = lors::sim::Site::current()) {
  return lors::sim::voted("__all_sync", mask, vote != 0, site) == mask;
}

// ---- atomics ----
namespace lors::sim {
// One atomic per operation `op`, a stateless function object of (before, operand).
template <typename T, typename Op>
T atomically(T* at, std::type_identity_t<T> operand, Op, Site site) {
  T before;
  const Combine combine = [](const void* from, void* after, const void* by) {
    T x, y;
    std::memcpy(&x, from, sizeof(T));
    std::memcpy(&y, by, sizeof(T));
    const T result = Op{}(x, y);
    std::memcpy(after, &result, sizeof(T));
  };
  atomic(at, &before, sizeof(T), combine, &operand, site);
  return before;
}
}  // namespace lors::sim

template <typename T>
T atomicAdd(T* at, std::type_identity_t<T> v, lors::sim::Site site = lors::sim::Site::current()) {
  return lors::sim::atomically(at, v, [](T x, T y) { return T(x + y); }, site);
}
template <typename T>
T atomicMax(T* at, std::type_identity_t<T> v, lors::sim::Site site = lors::sim::Site::current()) {
  return lors::sim::atomically(at, v, [](T x, T y) { return x < y ? y : x; }, site);
}
template <typename T>
T atomicMin(T* at, std::type_identity_t<T> v, lors::sim::Site site = lors::sim::Site::current()) {
  return lors::sim::atomically(at, v, [](T x, T y) { return y < x ? y : x; }, site);
}
template <typename T>
T atomicOr(T* at, std::type_identity_t<T> v, lors::sim::Site site = lors::sim::Site::current()) {
  return lors::sim::atomically(at, v, [](T x, T y) { return T(x | y); }, site);
}
template <typename T>
T atomicAnd(T* at, std::type_identity_t<T> v, lors::sim::Site site = lors::sim::Site::current()) {
  return lors::sim::atomically(at, v, [](T x, T y) { return T(x & y); }, site);
}
template <typename T>
T atomicExch(T* at, std::type_identity_t<T> v, lors::sim::Site site = lors::sim::Site::current()) {
  return lors::sim::atomically(at, v, [](T, T y) { return y; }, site);
}

// ---- integers and floats ----
inline int __popc(uint32_t x) { return std::popcount(x); }
inline int __popcll(uint64_t x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<uint32_t>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<uint32_t>(x)) + 1; }
inline uint32_t __brev(uint32_t x) {
  uint32_t reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}
// Each nibble of `selector` picks one of the eight bytes of (y, x).
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return result;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

// CUDA's min and max take mixed arithmetic types.
template <typename A, typename B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <typename A, typename B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

// ---- 16-bit arithmetic that the host headers lack ----
// The product of two 16-bit numbers is exact in double. Rounding the sum to double first changes the 16-bit result only on ties
// that need more than 53 bits.
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  const double product = static_cast<double>(__bfloat162float(a)) * static_cast<double>(__bfloat162float(b));
  return __double2bfloat16(product + static_cast<double>(__bfloat162float(c)));
}
inline __half __hfma(__half a, __half b, __half c) {
  const double product = static_cast<double>(__half2float(a)) * static_cast<double>(__half2float(b));
  return __double2half(product + static_cast<double>(__half2float(c)));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return __nv_bfloat162(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) { return __half2(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)); }
