// SPDX-License-Identifier: Apache-2.0
// The threads of one block, its shared memory and its mbarriers.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"
#include "memory.h"
#include "order.h"
#include "random.h"
#include "shadow.h"
#include "sim.h"

namespace lors::sim {

class Block;
class Cluster;
class Device;
class RequestLog;
struct MBarrier;
struct Warp;

struct AsyncCopy {
  uint32_t to = 0;  // offset in shared memory
  uint64_t from = 0;
  int from_bytes = 0;
  Site site;
  bool landed = false;
};

struct Thread {
  enum class State : uint8_t { ready, waiting, done };

  Coordinates coordinates;
  Fiber fiber;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int index = 0, lane = 0;
  State state = State::ready;
  const char* doing = "";  // for the report of a deadlock
  const MBarrier* waits_for = nullptr;
  Site site;  // of the last call into the runtime
  std::vector<AsyncCopy> uncommitted;
  std::deque<std::vector<AsyncCopy>> groups;
  // For the race detector: the clock up to which this thread has synchronised with each lane of its warp, its own clock
  // included, and what it knows besides that and the block's barriers.
  std::array<uint32_t, 32> seen;
  Known known;
  bool in_cluster_barrier = false;  // between arrive and wait
  uint32_t cluster_phase = 0;       // in which it arrived
};

// A warp collective that some lanes have reached and others have not.
struct Rendezvous {
  uint32_t mask = 0, arrived = 0;
  const char* name = nullptr;
  Site site;
  std::array<void*, 32> operands;
};

struct Warp {
  uint32_t lanes = 0;  // those that exist
  std::array<Thread*, 32> threads;
  std::vector<Rendezvous> meetings;
  std::unique_ptr<RequestLog> log;
};

struct MBarrier {
  uint32_t offset = 0;  // in shared memory
  uint32_t index = 0;   // among those of the block
  uint32_t count = 0, pending = 0;
  int64_t bytes = 0;  // that expect_tx has announced and no copy has brought; below 0: the other way round
  uint32_t phase = 0;
  int owner = 0;        // the thread that initialised it,
  bool fenced = false;  // and whether that is visible to bulk copies
  Knowledge arriving;   // of the threads that have arrived
  Known completed;      // of the last phase that is complete
  uint32_t copied = 0;  // phases up to the last one with a copy,
  Site copy_site;
  uint32_t waited = 0;  // and those that somebody has waited for
  std::vector<Thread*> waiting;
};

// The parameters of a launch.
struct Launch {
  const char* name = "";
  dim3 grid, block;
  uint32_t cluster = 1;  // blocks, along x
  int shared_bytes = 0;
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  uint32_t threads() const { return block.x * block.y * block.z; }
};

class Block {
 public:
  Block(Cluster& cluster, uint32_t rank);

  void prepare(uint3 index, uint32_t serial);
  void finish();
  bool done() const { return live_ == 0; }
  std::string describe_waiting() const;

  // Called by threads.
  void barrier(Site site);
  void meet(const char* name, uint32_t mask, void* operand, CollectiveBody body, Site site);
  void pause_sometimes();  // another thread may run, with the probability that the device asks for
  void wait(const char* doing, Site site);
  void wake(Thread& t);
  [[noreturn]] void abandon(const std::string& message);  // ends the block from a faulted thread, without unwinding it
  bool is_shared(uint64_t address) const { return address - shared_begin() < kSharedWindow; }
  uint8_t* shared_backing(uint32_t offset) const { return shared_.backing(shared_begin() + offset); }
  uint64_t shared_begin() const { return shared_.begin() + uint64_t{rank} * kSharedWindow; }
  uint64_t shadow_address(uint32_t offset) const { return uint64_t{rank} * kSharedWindow + offset; }

  Cluster& cluster;
  Device& device;
  const Launch& launch;
  const uint32_t rank;  // in the cluster
  uint32_t serial = 0;  // unique over all blocks of the process, and consecutive in a cluster
  uint32_t epoch = 0;   // barriers passed
  std::deque<MBarrier> mbarriers;
  std::map<uint32_t, Stamp> visitors;  // the last access of each thread of other blocks to this one's shared memory

  static Block* current;                              // the running thread's
  static Thread* thread;                              // the running one
  static constexpr uint64_t kSharedWindow = 1 << 20;  // addresses of each block of a cluster

 private:
  void pause();
  void check_end();
  static void thread_main();
  std::string describe(const Thread& t) const;

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<Thread*> at_barrier_;
  Site barrier_site_;
  Window& shared_;
  uint32_t live_ = 0;
};

// Adds what the thread knows to `to`; what it does afterwards is not part of that.
void release(Thread& thread, Knowledge& to);

// Names a thread in an error message.
std::string describe_thread(const Coordinates& c);
std::string describe_site(Site site);
std::string describe_index(uint3 index);
bool same_place(Site a, Site b);
// Identifies a place cheaply. Two template instances of one line may differ.
inline const void* key_of(Site site) { return std::bit_cast<const void*>(site); }

}  // namespace lors::sim
