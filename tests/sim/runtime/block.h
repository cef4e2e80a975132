// SPDX-License-Identifier: Apache-2.0
// The threads of one block and their scheduler, which runs one at a time, in random order, until it has to wait.
#pragma once

#include <array>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"
#include "memory.h"
#include "random.h"
#include "sim.h"

namespace lors::sim {

class Device;
class RequestLog;
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
  Warp* warp = nullptr;
  int index = 0, lane = 0;
  State state = State::ready;
  const char* doing = "";  // for the report of a deadlock
  Site site;               // of the last call into the runtime
  std::vector<AsyncCopy> uncommitted;
  std::deque<std::vector<AsyncCopy>> groups;
  // For the race detector: the clock up to which this thread has synchronised with each lane of its warp.
  std::array<uint32_t, 32> seen;
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

// The parameters of a launch.
struct Launch {
  const char* name = "";
  dim3 grid, block;
  int shared_bytes = 0;
  void (*body)(void*) = nullptr;
  void* context = nullptr;
};

class Block {
 public:
  Block(Device& device, const Launch& launch);
  ~Block();
  // Runs one block from start to end.
  void run(uint3 index);

  // Called by threads.
  void barrier(Site site);
  void meet(const char* name, uint32_t mask, void* operand, CollectiveBody body, Site site);
  void pause();                                           // another thread may run
  void pause_sometimes();                                 // with the probability that the device asks for
  [[noreturn]] void abandon(const std::string& message);  // ends the block from a faulted thread, without unwinding it
  bool is_shared(uint64_t address) const { return shared_.contains(address); }
  uint8_t* shared_backing(uint32_t offset) const { return shared_.backing(shared_.begin() + offset); }
  uint64_t shared_begin() const { return shared_.begin(); }

  Device& device;
  const Launch& launch;
  Random random;
  uint32_t serial = 0;  // unique over all blocks of the process
  uint32_t epoch = 0;   // barriers passed

  static uint32_t next_serial();  // of the next block to run

  static Block* current;
  static Thread* thread;  // the running one

 private:
  void prepare(uint3 index);
  void schedule();
  void finish();
  void wait(const char* doing, Site site);
  void wake(Thread& t);
  static void thread_main();
  std::string describe(const Thread& t) const;
  std::string describe_waiting() const;

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<Thread*> ready_;
  std::vector<Thread*> at_barrier_;
  Site barrier_site_;
  Window& shared_;
  std::string failure_;
};

// Names a thread in an error message.
std::string describe_thread(const Coordinates& c);
std::string describe_site(Site site);
bool same_place(Site a, Site b);
// Identifies a place cheaply. Two template instances of one line may differ.
inline const void* key_of(Site site) { return std::bit_cast<const void*>(site); }

}  // namespace lors::sim
