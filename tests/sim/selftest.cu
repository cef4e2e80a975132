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
};

}  // namespace

Status selftest(const SelfTest& test, const CudaHost& host) {
  for (const Named& known : kKernels)
    if (test.kernel == known.name)
      return cuda::launch(known.name, known.kernel, dim3(test.blocks), dim3(test.threads), test.shared_bytes, host,
                          static_cast<Words>(test.in), static_cast<Out>(test.out), test.n);
  return Status::error("there is no self-test kernel '" + test.kernel + "'");
}

}  // namespace lors::sim
