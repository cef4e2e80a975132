// SPDX-License-Identifier: Apache-2.0
// Small kernels, most of them wrong on purpose, for test_simulator.py. `in` and `out` are words; `n` means what each says.
#include "selftest.h"

#include <array>

#include "launch.h"
#include "ptx.h"

namespace lors::sim {
namespace {

using Words = const uint32_t*;
using Out = uint32_t*;

__device__ uint32_t* shared_words() { return reinterpret_cast<uint32_t*>(ptx::dynamic_shared()); }
__device__ int global_index() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

// ---- collectives ----
__global__ void divergent_collective(Words, Out out, int) {
  int v = threadIdx.x;
  if (threadIdx.x % 2 == 0)
    v = __shfl_xor_sync(~0u, v, 1);
  else
    __syncwarp();
  ptx::store_global(out + threadIdx.x, static_cast<uint32_t>(v));
}
__global__ void collective_in_branch(Words, Out out, int) {
  uint32_t votes = 0;
  if (threadIdx.x < 16) votes = __ballot_sync(~0u, 1);
  ptx::store_global(out + threadIdx.x, votes);
}
__global__ void barrier_in_branch(Words, Out, int) {
  if (threadIdx.x < 32) __syncthreads();
}
__global__ void two_barriers(Words, Out, int) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void reduce(Words in, Out out, int) {
  uint32_t v = ptx::load_global(in + global_index());
  for (int bits = 16; bits > 0; bits /= 2) v += __shfl_xor_sync(~0u, v, bits);
  if (threadIdx.x % 32 == 0) atomicAdd(out, v);
}

// ---- shared memory ----
// Each thread reads its neighbour's word; n = 1: after a barrier, 2: after a __syncwarp, 0: at once.
__global__ void neighbour(Words in, Out out, int n) {
  ptx::store_shared(shared_words() + threadIdx.x, ptx::load_global(in + threadIdx.x));
  if (n == 1) __syncthreads();
  if (n == 2) __syncwarp();
  const uint32_t from = (threadIdx.x + 1) % blockDim.x;
  ptx::store_global(out + threadIdx.x, ptx::load_shared(shared_words() + from));
}
// A buffer used twice; n = 1: with a barrier before the second use.
__global__ void reuse(Words in, Out out, int n) {
  uint32_t sum = 0;
  for (uint32_t round = 0; round < 2; ++round) {
    if (round == 1 && n == 1) __syncthreads();
    ptx::store_shared(shared_words() + threadIdx.x, ptx::load_global(in + threadIdx.x) + round);
    __syncthreads();
    sum += ptx::load_shared(shared_words() + (threadIdx.x + 1) % blockDim.x);
  }
  ptx::store_global(out + threadIdx.x, sum);
}
__global__ void uninitialised(Words, Out out, int) {
  ptx::store_global(out + threadIdx.x, ptx::load_shared(shared_words() + threadIdx.x));
}
// Words n past the thread's own.
__global__ void shared_at(Words, Out out, int n) {
  const uint32_t* p = shared_words() + threadIdx.x + n;
  ptx::store_global(out + threadIdx.x, ptx::load_shared(p));
}

// ---- asynchronous copies ----
// 16 bytes per thread. n = 0: right; 1: no wait; 2: a wait that leaves the last group in flight; 3: no barrier after the wait;
// 4: no commit, so that the wait has no group to wait for.
__global__ void copies(Words in, Out out, int n) {
  const uint32_t to = ptx::shared_address(shared_words() + 4 * threadIdx.x);
  ptx::cp_async_16(to, in + 4 * threadIdx.x, 16);
  if (n != 4) ptx::cp_async_commit();
  if (n == 0 || n == 3 || n == 4) ptx::cp_async_wait<0>();
  if (n == 2) ptx::cp_async_wait<1>();
  if (n != 3) __syncthreads();
  const uint32_t from = n == 3 || n == 0 ? (threadIdx.x + 1) % blockDim.x : threadIdx.x;
  for (uint32_t i = 0; i < 4; ++i)
    ptx::store_global(out + 4 * threadIdx.x + i, ptx::load_shared(shared_words() + 4 * from + i));
  if (n == 2) ptx::cp_async_wait<0>();
}
// A copy into bytes that others may still be reading.
__global__ void copy_over_readers(Words in, Out out, int) {
  ptx::store_shared(shared_words() + threadIdx.x, ptx::load_global(in + threadIdx.x));
  __syncthreads();
  const uint32_t v = ptx::load_shared(shared_words() + (threadIdx.x + 4) % blockDim.x);
  if (threadIdx.x % 4 == 0) ptx::cp_async_16(ptx::shared_address(shared_words() + threadIdx.x), in + threadIdx.x, 16);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::store_global(out + threadIdx.x, v);
}

// ---- mbarriers and bulk copies ----
// Two rows of 64 words come by one bulk copy each, and 64 threads copy them to `out`. kRight, or which mistake.
enum Bulk {
  kRight,
  kNoFence,
  kNoWait,
  kExpectMore,
  kExpectLess,
  kEarlierPhase,
  kLaterPhase,
  kMisalignedSource,
  kMisalignedTarget,
  kOddSize,
  kNoBarrierAfterInit,
  kArriveTwice,
  kStoreOverMBarrier,
  kCopyOverReaders,
  kCopyOverStores,
  kPastShared,
  kPastGlobal,
  kNoInit,
  kInitTwice,
};
__global__ void bulk_copies(Words in, Out out, int n) {
  uint32_t* const words = shared_words();
  const uint32_t mbarrier = ptx::shared_address(words + 128), bytes = n == kOddSize ? 248 : 256;
  if (n == kCopyOverReaders || n == kCopyOverStores) {
    ptx::store_shared(words + threadIdx.x, 1u);
    if (n == kCopyOverStores) __syncthreads();
  }
  if (threadIdx.x == 0 && n != kNoInit) {
    ptx::mbarrier_init(mbarrier, 1);
    if (n == kInitTwice) ptx::mbarrier_init(mbarrier, 1);
    if (n != kNoFence) ptx::fence_mbarrier_init();
  }
  if (n != kNoBarrierAfterInit) __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect(mbarrier, n == kExpectMore ? 528 : n == kExpectLess ? 256 : 2 * bytes);
    if (n == kArriveTwice) ptx::mbarrier_arrive(mbarrier);
    for (uint32_t row = 0; row < 2; ++row)
      ptx::copy_bulk(ptx::shared_address(words + 64 * row) + (n == kMisalignedTarget ? 8
                                                              : n == kPastShared     ? 272
                                                                                     : 0),
                     in + 64 * row +
                         (n == kMisalignedSource ? 2
                          : n == kPastGlobal     ? 4064
                                                 : 0),
                     bytes, mbarrier);
  }
  if (n == kStoreOverMBarrier) ptx::store_shared(words + 128, 1u);
  if (n != kNoWait) ptx::mbarrier_wait(mbarrier, n == kEarlierPhase ? 1 : 0);
  if (n == kLaterPhase) ptx::mbarrier_wait(mbarrier, 1);
  for (uint32_t row = 0; row < 2; ++row)
    ptx::store_global(out + 64 * row + threadIdx.x, ptx::load_shared(words + 64 * row + threadIdx.x));
}
// `n % 16` stages of 64 words, refilled by thread 0; out[thread] is a sum over 10 steps. n / 16 = 0: right; 1: refilled while
// others may still be reading; 2: the parity never changes.
__global__ void bulk_pipeline(Words in, Out out, int n) {
  const int stages = n % 16, mistake = n / 16, steps = 10;
  uint32_t* const words = shared_words();
  const uint32_t mbarriers = ptx::shared_address(words + 64 * stages);
  const auto fill = [&](int step) {
    if (threadIdx.x != 0 || step >= steps) return;
    const uint32_t mbarrier = mbarriers + 8 * static_cast<uint32_t>(step % stages);
    ptx::mbarrier_arrive_expect(mbarrier, 256);
    ptx::copy_bulk(ptx::shared_address(words + 64 * (step % stages)), in + 64 * step, 256, mbarrier);
  };
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) ptx::mbarrier_init(mbarriers + 8 * static_cast<uint32_t>(i), 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  for (int i = 0; i < stages - 1; ++i) fill(i);
  uint32_t sum = 0;
  for (int step = 0; step < steps; ++step) {
    ptx::mbarrier_wait(mbarriers + 8 * static_cast<uint32_t>(step % stages),
                       mistake == 2 ? 0 : static_cast<uint32_t>(step / stages % 2));
    if (mistake != 1) __syncthreads();
    fill(step + stages - 1);
    sum += ptx::load_shared(words + 64 * (step % stages) + (threadIdx.x + 1) % 64);
  }
  ptx::store_global(out + threadIdx.x, sum);
}

// ---- clusters ----
// Four words per thread, added over the blocks of a cluster in the order of their ranks.
enum Across {
  kAdded,
  kNoFirstBarrier,
  kNoLastBarrier,
  kClusterArriveTwice,
  kWaitWithoutArrive,
  kRankTooLarge,
  kMisalignedRead,
  kWrittenAfterArrive,
  kPushed,  // each block stores to the next one's shared memory
  kPushedAtOnce,
  kPushedUnordered,
  kEndedInBarrier,
  kDivergentArrive,
};
__global__ void across_cluster(Words in, Out out, int n) {
  const auto values = [&](uint32_t rank) {
    const uint32_t* const from = in + 4 * (blockDim.x * rank + threadIdx.x);
    return make_float4(float(ptx::load_global(from)), float(ptx::load_global(from + 1)), float(ptx::load_global(from + 2)),
                       float(ptx::load_global(from + 3)));
  };
  auto* const mine = reinterpret_cast<float4*>(ptx::dynamic_shared()) + threadIdx.x;
  const uint32_t size = ptx::cluster_size(), rank = ptx::cluster_rank();
  const bool pushed = n == kPushed || n == kPushedAtOnce || n == kPushedUnordered;
  float4 sum = make_float4(0, 0, 0, 0);
  if (pushed && n != kPushedAtOnce) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  if (pushed)
    ptx::store_cluster(ptx::map_shared(ptx::shared_address(mine), (rank + 1) % size), values(rank));
  else if (n != kWrittenAfterArrive)
    ptx::store_shared(mine, values(rank));
  if (n != kNoFirstBarrier && n != kPushedUnordered && n != kWaitWithoutArrive) {
    if (n != kDivergentArrive || threadIdx.x % 2 == 0) ptx::cluster_arrive();
    if (n == kClusterArriveTwice) ptx::cluster_arrive();
    if (n == kEndedInBarrier) return;
    if (n == kWrittenAfterArrive) ptx::store_shared(mine, values(rank));
  }
  if (n != kNoFirstBarrier && n != kPushedUnordered) ptx::cluster_wait();
  if (pushed) {
    sum = ptx::load_shared(mine);
  } else {
    for (uint32_t of = 0; of < size; ++of) {
      const uint32_t at = ptx::map_shared(ptx::shared_address(mine), n == kRankTooLarge ? of + 1 : of);
      const float4 part = ptx::load_cluster(n == kMisalignedRead ? at + 8 : at);
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
  }
  if (n != kNoLastBarrier) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  ptx::store_global(reinterpret_cast<float4*>(out) + blockDim.x * blockIdx.x + threadIdx.x, sum);
}

// ---- global memory ----
__global__ void read_at(Words in, Out out, int n) {
  ptx::store_global(out + threadIdx.x, ptx::load_global(in + static_cast<int>(threadIdx.x) + n));
}
__global__ void write_at(Words, Out out, int n) { ptx::store_global(out + static_cast<int>(threadIdx.x) + n, 1u); }
__global__ void read_vector_at(Words in, Out out, int n) {
  const uint4 v = ptx::load_global(reinterpret_cast<const uint4*>(in + n) + threadIdx.x);
  ptx::store_global(out + threadIdx.x, v.x);
}
// Every block writes the same words. n = 1: atomically.
__global__ void same_words(Words, Out out, int n) {
  if (n == 1)
    atomicAdd(out + threadIdx.x, 1u);
  else
    ptx::store_global(out + threadIdx.x, 1u);
}
// Every block reads a word that block 0 writes.
__global__ void read_what_another_writes(Words, Out out, int) {
  const uint32_t v = ptx::load_global(out);
  if (blockIdx.x == 0 && threadIdx.x == 0) ptx::store_global(out, v + 1);
}
// Adjacent bytes by different threads and blocks: no race.
__global__ void bytes(Words, Out out, int) {
  ptx::store_global(reinterpret_cast<uint8_t*>(out) + global_index(), uint8_t(global_index()));
}
__global__ void once_and_written(Words, Out out, int) {
  const uint4 v = ptx::load_global_once(reinterpret_cast<const uint4*>(out) + threadIdx.x);
  ptx::store_global(out + 4 * threadIdx.x, v.x + 1);
}

// ---- raw accesses, which must be detected ----
__global__ void raw_global_read(Words in, Out out, int) { ptx::store_global(out + threadIdx.x, in[threadIdx.x]); }
__global__ void raw_global_write(Words, Out out, int) { out[threadIdx.x] = 1; }
__global__ void raw_shared_write(Words, Out, int) { shared_words()[threadIdx.x] = 1; }
__global__ void raw_struct_copy(Words in, Out out, int) {
  std::array<uint4, 4> local;  // large enough for the compiler to call memcpy
  __builtin_memcpy(&local, in, sizeof(local));
  ptx::store_global(reinterpret_cast<uint4*>(out), local[threadIdx.x % 4]);
}
__global__ void deep_recursion(Words in, Out out, int n) {
  volatile char frame[4096];
  frame[n] = 1;
  if (n > 0) deep_recursion(in, out, n - 1);
  ptx::store_global(out + n, static_cast<uint32_t>(frame[n]));  // the frame is in use until here
}
// n is an index into four registers.
__global__ void local_array(Words, Out out, int n) {
  uint32_t local[4] = {1, 2, 3, 4};
  for (uint32_t i = 0; i < 4; ++i) local[i] += threadIdx.x;
  ptx::store_global(out + threadIdx.x, local[n]);
}
__global__ void shift_too_far(Words, Out out, int n) { ptx::store_global(out + threadIdx.x, 1u << n); }

// ---- for the counters ----
__global__ void copy_vectors(Words in, Out out, int) {
  const uint4 v = ptx::load_global(reinterpret_cast<const uint4*>(in) + global_index());
  ptx::store_global(reinterpret_cast<uint4*>(out) + global_index(), v);
}
// Every n-th word.
__global__ void copy_strided(Words in, Out out, int n) {
  ptx::store_global(out + n * global_index(), ptx::load_global(in + n * global_index()));
}
// Words n apart in shared memory.
__global__ void shared_strided(Words, Out, int n) {
  ptx::store_shared(shared_words() + static_cast<int>(threadIdx.x) * n, threadIdx.x);
  __syncthreads();
  ptx::load_shared(shared_words() + static_cast<int>(threadIdx.x) * n);
}
// 16 bytes per lane, n bytes apart.
__global__ void shared_vectors(Words, Out, int n) {
  auto* p = reinterpret_cast<uint4*>(ptx::dynamic_shared() + static_cast<int>(threadIdx.x) * n);
  ptx::store_shared(p, make_uint4(1, 2, 3, 4));
  __syncthreads();
  ptx::load_shared(p);
}
// Rows n bytes apart.
__global__ void matrix_rows(Words, Out, int n) {
  auto* row = ptx::dynamic_shared() + static_cast<int>(threadIdx.x) * n;
  ptx::store_shared(reinterpret_cast<uint4*>(row), make_uint4(1, 2, 3, 4));
  __syncwarp();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, ptx::shared_address(row));
}
// A loop whose trip count differs by lane, between two synchronisations of the warp.
__global__ void uneven_loop(Words in, Out out, int) {
  uint32_t sum = 0;
  for (uint32_t i = 0; i < threadIdx.x % 4; ++i) sum += ptx::load_global(in + 32 * i + threadIdx.x);
  __syncwarp();
  ptx::store_global(out + threadIdx.x, sum + ptx::load_global(in + threadIdx.x));
}

// Each thread follows a script of n words: op | width << 4 | offset << 8; see test_race_detector.py.
template <typename T>
__device__ void scripted_access(uint32_t op, uint8_t* shared, uint8_t* global) {
  if (op == 1) ptx::load_shared(reinterpret_cast<T*>(shared));
  if (op == 2) ptx::store_shared(reinterpret_cast<T*>(shared), T(1));
  if (op == 3) ptx::load_global(reinterpret_cast<T*>(global));
  if (op == 4) ptx::store_global(reinterpret_cast<T*>(global), T(1));
  if (op == 5) atomicAdd(reinterpret_cast<T*>(global), T(1));
}
__global__ void scripted(Words in, Out out, int n) {
  for (uint32_t i = threadIdx.x; i < 16; i += blockDim.x) ptx::store_shared(shared_words() + i, 0u);
  __syncthreads();
  for (int i = 0; i < n; ++i) {
    const uint32_t word = ptx::load_global(in + n * global_index() + i), op = word & 15, width = word >> 4 & 15;
    uint8_t* const shared = ptx::dynamic_shared() + (word >> 8);
    uint8_t* const global = reinterpret_cast<uint8_t*>(out) + (word >> 8);
    if (op == 6) __syncthreads();
    if (op == 7) __syncwarp();
    if (width == 1) scripted_access<uint8_t>(op, shared, global);
    if (width == 2) scripted_access<uint16_t>(op, shared, global);
    if (width == 4) scripted_access<uint32_t>(op, shared, global);
  }
}
// The same with mbarriers and clusters: op | rank << 4 | offset << 8. The mbarrier of a block takes as many arrivals as the
// first word of the block's first script says.
__global__ void scripted_cluster(Words in, Out out, int n) {
  const uint32_t mbarrier = ptx::shared_address(shared_words() + 16);
  for (uint32_t i = threadIdx.x; i < 16; i += blockDim.x) ptx::store_shared(shared_words() + i, 0u);
  const uint32_t count = ptx::load_global(in + n * (global_index() - static_cast<int>(threadIdx.x)));
  if (threadIdx.x == 0 && count > 0) ptx::mbarrier_init(mbarrier, count);
  ptx::cluster_arrive();
  ptx::cluster_wait();
  for (int i = 1; i < n; ++i) {
    const uint32_t word = ptx::load_global(in + n * global_index() + i), op = word & 15, offset = word >> 8;
    uint8_t* const shared = ptx::dynamic_shared() + offset;
    if (op == 1) ptx::load_shared(reinterpret_cast<uint32_t*>(shared));
    if (op == 2) ptx::store_shared(reinterpret_cast<uint32_t*>(shared), 1u);
    if (op == 3) ptx::load_cluster(ptx::map_shared(ptx::shared_address(shared), word >> 4 & 15));
    if (op == 4) ptx::store_cluster(ptx::map_shared(ptx::shared_address(shared), word >> 4 & 15), make_float4(0, 0, 0, 0));
    if (op == 5) ptx::load_global(reinterpret_cast<uint32_t*>(reinterpret_cast<uint8_t*>(out) + offset));
    if (op == 6) ptx::store_global(reinterpret_cast<uint32_t*>(reinterpret_cast<uint8_t*>(out) + offset), 1u);
    if (op == 7) ptx::mbarrier_arrive(mbarrier);
    if (op == 8) ptx::mbarrier_wait(mbarrier, 0);
    if (op == 9) ptx::cluster_arrive();
    if (op == 10) ptx::cluster_wait();
    if (op == 11) __syncthreads();
    if (op == 12) __syncwarp();
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

struct Named {
  const char* name;
  void (*kernel)(Words, Out, int);
};
#define LORS_SIM_KERNEL(name) {#name, name}
constexpr Named kKernels[] = {
    LORS_SIM_KERNEL(divergent_collective),
    LORS_SIM_KERNEL(collective_in_branch),
    LORS_SIM_KERNEL(barrier_in_branch),
    LORS_SIM_KERNEL(two_barriers),
    LORS_SIM_KERNEL(reduce),
    LORS_SIM_KERNEL(neighbour),
    LORS_SIM_KERNEL(reuse),
    LORS_SIM_KERNEL(uninitialised),
    LORS_SIM_KERNEL(shared_at),
    LORS_SIM_KERNEL(copies),
    LORS_SIM_KERNEL(copy_over_readers),
    LORS_SIM_KERNEL(bulk_copies),
    LORS_SIM_KERNEL(bulk_pipeline),
    LORS_SIM_KERNEL(across_cluster),
    LORS_SIM_KERNEL(read_at),
    LORS_SIM_KERNEL(write_at),
    LORS_SIM_KERNEL(read_vector_at),
    LORS_SIM_KERNEL(same_words),
    LORS_SIM_KERNEL(read_what_another_writes),
    LORS_SIM_KERNEL(bytes),
    LORS_SIM_KERNEL(once_and_written),
    LORS_SIM_KERNEL(raw_global_read),
    LORS_SIM_KERNEL(raw_global_write),
    LORS_SIM_KERNEL(raw_shared_write),
    LORS_SIM_KERNEL(raw_struct_copy),
    LORS_SIM_KERNEL(deep_recursion),
    LORS_SIM_KERNEL(local_array),
    LORS_SIM_KERNEL(shift_too_far),
    LORS_SIM_KERNEL(copy_vectors),
    LORS_SIM_KERNEL(copy_strided),
    LORS_SIM_KERNEL(shared_strided),
    LORS_SIM_KERNEL(shared_vectors),
    LORS_SIM_KERNEL(matrix_rows),
    LORS_SIM_KERNEL(uneven_loop),
    LORS_SIM_KERNEL(scripted),
    LORS_SIM_KERNEL(scripted_cluster),
};

}  // namespace

Status selftest(const SelfTest& test, const CudaHost& host) {
  for (const Named& known : kKernels)
    if (test.kernel == known.name)
      return cuda::launch(known.name, known.kernel, {dim3(test.blocks), test.cluster}, dim3(test.threads), test.shared_bytes,
                          host, static_cast<Words>(test.in), static_cast<Out>(test.out), test.n);
  return Status::error("there is no self-test kernel '" + test.kernel + "'");
}

}  // namespace lors::sim
