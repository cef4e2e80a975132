// SPDX-License-Identifier: Apache-2.0
// The functions of csrc/core/cuda/ptx.h on the simulator; what each does is said there.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda_words.h"

namespace lors::ptx {

inline uint8_t* dynamic_shared() { return sim::dynamic_shared(); }
inline uint32_t shared_address(const void* p, sim::Site site = sim::Site::current()) { return sim::shared_address(p, site); }

template <typename T>
constexpr bool is_accessible = std::is_trivially_copyable_v<T> &&
                               (sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);

template <typename T>
inline std::remove_cv_t<T> load_global(const T* p, sim::Site site = sim::Site::current()) {
  static_assert(is_accessible<T>);
  std::remove_cv_t<T> v;
  sim::load_global(&v, p, sizeof(T), false, site);
  return v;
}
inline uint4 load_global_once(const uint4* p, sim::Site site = sim::Site::current()) {
  uint4 v;
  sim::load_global(&v, p, sizeof(v), true, site);
  return v;
}
template <typename T>
inline void store_global(T* p, T v, sim::Site site = sim::Site::current()) {
  static_assert(is_accessible<T>);
  sim::store_global(p, &v, sizeof(T), site);
}
inline void load_global_if(int number, int limit, uint4& v, const uint4* p, sim::Site site = sim::Site::current()) {
  if (number > limit) v = load_global_once(p, site);
}
inline void load_global_if(int number, int limit, uint2& v, const uint2* p, sim::Site site = sim::Site::current()) {
  if (number > limit) v = load_global(p, site);
}
template <typename T>
inline void store_global_if(int number, int limit, T* p, const T& v, sim::Site site = sim::Site::current()) {
  if (number > limit) store_global(p, v, site);
}
template <typename T>
inline std::remove_cv_t<T> load_shared(const T* p, sim::Site site = sim::Site::current()) {
  static_assert(is_accessible<T>);
  std::remove_cv_t<T> v;
  sim::load_shared(&v, p, sizeof(T), site);
  return v;
}
template <typename T>
inline void store_shared(T* p, T v, sim::Site site = sim::Site::current()) {
  static_assert(is_accessible<T>);
  sim::store_shared(p, &v, sizeof(T), site);
}

inline uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) { return __byte_perm(low, high, selector); }

inline void cp_async_16(uint32_t dst, const void* src, int src_bytes, sim::Site site = sim::Site::current()) {
  sim::copy_async(dst, src, src_bytes, site);
}
inline void cp_async_commit() { sim::commit_copies(); }
template <int Pending>
inline void cp_async_wait() {
  static_assert(Pending >= 0);
  sim::wait_for_copies(Pending);
}

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t row, sim::Site site = sim::Site::current()) {
  sim::load_matrices(r, row, false, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row, sim::Site site = sim::Site::current()) {
  sim::load_matrices(r, row, true, site);
}

template <typename T>
inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                         sim::Site site = sim::Site::current()) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  const uint32_t b[2] = {b0, b1};
  sim::multiply(c, a, b, std::is_same_v<T, __nv_bfloat16>, site);
}
template <typename T>
inline void mma_m16n8k16_zero(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                              sim::Site site = sim::Site::current()) {
  for (float& sum : c) sum = 0.f;
  mma_m16n8k16<T>(c, a, b0, b1, site);
}

constexpr bool kClusters = true;
inline uint32_t cluster_rank() { return sim::coordinates->cluster_rank; }
inline uint32_t cluster_size() { return sim::coordinates->cluster_size; }
inline void cluster_arrive(sim::Site site = sim::Site::current()) { sim::cluster_arrive(site); }
inline void cluster_wait(sim::Site site = sim::Site::current()) { sim::cluster_wait(site); }
inline uint32_t map_shared(uint32_t address, uint32_t rank, sim::Site site = sim::Site::current()) {
  return sim::map_shared(address, rank, site);
}
inline float4 load_cluster(uint32_t address, sim::Site site = sim::Site::current()) {
  float4 v;
  sim::load_cluster(&v, address, sizeof(v), site);
  return v;
}
inline void store_cluster(uint32_t address, const float4& v, sim::Site site = sim::Site::current()) {
  sim::store_cluster(address, &v, sizeof(v), site);
}

inline void mbarrier_init(uint32_t mbarrier, uint32_t count, sim::Site site = sim::Site::current()) {
  sim::mbarrier_init(mbarrier, count, site);
}
inline void fence_mbarrier_init() { sim::fence_mbarrier_init(); }
inline void mbarrier_arrive(uint32_t mbarrier, sim::Site site = sim::Site::current()) {
  sim::mbarrier_arrive(mbarrier, 0, site);
}
inline void mbarrier_arrive_expect(uint32_t mbarrier, uint32_t bytes, sim::Site site = sim::Site::current()) {
  sim::mbarrier_arrive(mbarrier, bytes, site);
}
inline void mbarrier_wait(uint32_t mbarrier, uint32_t parity, sim::Site site = sim::Site::current()) {
  sim::mbarrier_wait(mbarrier, parity, site);
}
inline void copy_bulk(uint32_t dst, const void* src, uint32_t bytes, uint32_t mbarrier, sim::Site site = sim::Site::current()) {
  sim::copy_bulk(dst, src, bytes, mbarrier, site);
}

}  // namespace lors::ptx
