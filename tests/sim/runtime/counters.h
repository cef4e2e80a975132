// SPDX-License-Identifier: Apache-2.0
// Counts the memory accesses of a launch per warp request, as the hardware's profiler does.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "sim.h"

namespace lors::sim {

// One list of names, for adding up and for exporting.
struct Counters {
  uint64_t blocks = 0, barriers = 0, warp_syncs = 0, shuffles = 0, votes = 0, atomics = 0;
  uint64_t global_load_requests = 0, global_store_requests = 0;  // of a warp
  uint64_t global_bytes_read = 0, global_bytes_written = 0;      // requested, copies included
  uint64_t global_sectors_read = 0, global_sectors_written = 0;  // of 32 bytes, summed over requests
  uint64_t shared_load_requests = 0, shared_store_requests = 0;
  uint64_t shared_bytes_read = 0, shared_bytes_written = 0;
  uint64_t shared_load_conflicts = 0, shared_store_conflicts = 0;  // wavefronts beyond those without bank conflicts
  uint64_t ldmatrix = 0, ldmatrix_conflicts = 0;
  uint64_t copy_requests = 0, copy_bytes = 0, copy_conflicts = 0;  // cp.async: of a warp; read; of its shared writes
  uint64_t mma = 0;
  uint64_t bulk_copies = 0, bulk_bytes = 0;  // read from global memory by bulk copies
  uint64_t cluster_barriers = 0;
  uint64_t cluster_bytes_read = 0, cluster_bytes_written = 0;  // of the shared memory of other blocks
  // Accesses of single lanes by their width, global memory only.
  std::array<uint64_t, 5> loads_by_width{}, stores_by_width{};  // 1, 2, 4, 8, 16 bytes
};

// Calls visit(name, counter) for every scalar counter.
template <typename C, typename Visit>
void for_counters(C& c, Visit visit) {
  visit("blocks", c.blocks);
  visit("barriers", c.barriers);
  visit("warp_syncs", c.warp_syncs);
  visit("shuffles", c.shuffles);
  visit("votes", c.votes);
  visit("atomics", c.atomics);
  visit("global_load_requests", c.global_load_requests);
  visit("global_store_requests", c.global_store_requests);
  visit("global_bytes_read", c.global_bytes_read);
  visit("global_bytes_written", c.global_bytes_written);
  visit("global_sectors_read", c.global_sectors_read);
  visit("global_sectors_written", c.global_sectors_written);
  visit("shared_load_requests", c.shared_load_requests);
  visit("shared_store_requests", c.shared_store_requests);
  visit("shared_bytes_read", c.shared_bytes_read);
  visit("shared_bytes_written", c.shared_bytes_written);
  visit("shared_load_conflicts", c.shared_load_conflicts);
  visit("shared_store_conflicts", c.shared_store_conflicts);
  visit("ldmatrix", c.ldmatrix);
  visit("ldmatrix_conflicts", c.ldmatrix_conflicts);
  visit("copy_requests", c.copy_requests);
  visit("copy_bytes", c.copy_bytes);
  visit("copy_conflicts", c.copy_conflicts);
  visit("mma", c.mma);
  visit("bulk_copies", c.bulk_copies);
  visit("bulk_bytes", c.bulk_bytes);
  visit("cluster_barriers", c.cluster_barriers);
  visit("cluster_bytes_read", c.cluster_bytes_read);
  visit("cluster_bytes_written", c.cluster_bytes_written);
}

// A set of sector numbers, dense where it is used.
class SectorSet {
 public:
  bool insert(uint64_t sector);  // whether it is new

 private:
  std::unordered_map<uint64_t, std::array<uint64_t, 64>> pages_;
  uint64_t last_key_ = ~uint64_t{0};
  std::array<uint64_t, 64>* last_ = nullptr;
};

// Of one buffer in one launch.
struct Traffic {
  uint64_t sectors_read = 0, sectors_written = 0;                // summed over requests
  uint64_t unique_sectors_read = 0, unique_sectors_written = 0;  // different ones
  uint64_t bytes_read = 0, bytes_written = 0;                    // requested
  SectorSet read, written;
};

struct LaunchRecord {
  std::string name;
  dim3 grid, block;
  uint32_t cluster = 1;
  int shared_bytes = 0;
  Counters counters;
  std::map<int, Traffic> traffic;  // by buffer

  void add_bulk_copy(uint64_t address, uint32_t bytes, int buffer);
};

enum class Space : uint8_t { global_load, global_store, shared_load, shared_store, copy_source, copy_target };

// Groups the accesses of a warp's lanes into requests: the n-th access of each lane at one place since the lanes last
// synchronised.
class RequestLog {
 public:
  RequestLog(LaunchRecord& record, uint32_t lanes) : record_(record), lanes_(lanes) {}
  // `moved`: bytes that count as read or written, at most `width`. `buffer`: of a global address.
  void add(Space space, Site site, int lane, uint64_t address, int width, int moved, int buffer);
  // The lanes have synchronised, or the block has ended.
  void flush();

 private:
  struct Request {
    uint32_t lanes = 0, bytes = 0;
    int width = 0, buffer = -1;
    std::array<uint64_t, 32> address;
  };
  struct Place {
    const void* key;
    Space space;
    uint32_t processed = 0;            // requests that are complete and removed
    std::array<uint32_t, 32> reached;  // accesses of each lane
    std::vector<Request> open;         // from `processed` on; kept, emptied, for reuse
    size_t used = 0;
  };
  void process(Space space, const Request& request);
  void process_global(bool is_write, const Request& request);

  LaunchRecord& record_;
  uint32_t lanes_;
  std::vector<Place> places_;
  size_t used_places_ = 0, last_ = 0;
};

// Wavefronts of one request to shared memory beyond those it would need without bank conflicts. A wavefront has 32 lanes of
// 4-byte accesses, 16 of 8-byte or 8 of 16-byte ones.
int bank_conflicts(const uint64_t* address, uint32_t lanes, int width);

}  // namespace lors::sim
