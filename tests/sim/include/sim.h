// SPDX-License-Identifier: Apache-2.0
// The runtime's entry points behind CUDA's built-ins (cuda_words.h) and the functions of ptx_sim.h. Each takes the place in the
// kernel's source from which it was called.
#pragma once

#include <vector_types.h>

#include <bit>
#include <cstdint>
#include <source_location>
#include <stdexcept>
#include <string>

namespace lors::sim {

// As a default argument it is the caller's place.
using Site = std::source_location;

// A kernel's fault, with its place and thread. Propagates through the launcher to its caller.
struct Error : std::runtime_error {
  using runtime_error::runtime_error;
};

struct Coordinates {
  uint3 thread, block;
  dim3 block_size, grid_size;
  uint32_t cluster_rank = 0, cluster_size = 1;  // of the block
};
extern const Coordinates* coordinates;  // of the running thread

[[noreturn]] void fail(Site site, const std::string& message);

// ---- memory ----
// Addresses that kernels see are backed by no page: only these functions translate them, so a plain `*p` faults and is
// reported. `bytes` is 1, 2, 4, 8 or 16 and the address must be a multiple of it.
void load_global(void* value, const void* from, int bytes, bool once, Site site);
void store_global(void* to, const void* value, int bytes, Site site);
void load_shared(void* value, const void* from, int bytes, Site site);
void store_shared(void* to, const void* value, int bytes, Site site);
// Reads into `before`, lets combine(before, after, operand) decide, writes. The address may be global or shared.
using Combine = void (*)(const void* before, void* after, const void* operand);
void atomic(void* at, void* before, int bytes, Combine combine, const void* operand, Site site);

uint8_t* dynamic_shared();
uint32_t shared_address(const void* p, Site site);

void copy_async(uint32_t to, const void* from, int from_bytes, Site site);
void commit_copies();
void wait_for_copies(int pending);

uint32_t map_shared(uint32_t address, uint32_t rank, Site site);
void load_cluster(void* value, uint32_t address, int bytes, Site site);
void store_cluster(uint32_t address, const void* value, int bytes, Site site);

void mbarrier_init(uint32_t address, uint32_t count, Site site);
void fence_mbarrier_init();
void mbarrier_arrive(uint32_t address, uint32_t expected_bytes, Site site);
void mbarrier_wait(uint32_t address, uint32_t parity, Site site);
void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t address, Site site);

// ---- warp collectives ----
void cluster_arrive(Site site);
void cluster_wait(Site site);
void block_barrier(Site site);

// Waits for all lanes of `mask`; the last one runs body(operands of each lane, mask) for all.
using CollectiveBody = void (*)(void* const* operands, uint32_t mask);
void collective(const char* name, uint32_t mask, void* operand, CollectiveBody body, Site site);

struct ShuffleOperand {
  uint64_t value;
  int source;  // lane
  uint64_t result;
};
void shuffle(void* const* operands, uint32_t mask);
struct VoteOperand {
  bool vote;
  uint32_t ballot;
};
void ballot(void* const* operands, uint32_t mask);
int lane();

// The 16 bytes at a 32-bit shared address, for ldmatrix.
void read_shared_row(void* row, uint32_t address, Site site);
void load_matrices(uint32_t (&r)[4], uint32_t row, bool transposed, Site site);
void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool is_bfloat16, Site site);

// ---- launching ----
int device_multiprocessors();
int device_shared_bytes();
int device_architecture();
// Runs body(context) once per thread. Returns a message where CUDA would refuse the launch; throws Error where the
// kernel is at fault.
std::string run_grid(const char* name, dim3 grid, dim3 block, uint32_t cluster, int shared_bytes, const void* stream,
                     void (*body)(void*), void* context);

}  // namespace lors::sim
