// SPDX-License-Identifier: Apache-2.0
// Runs a grid, its clusters one after another in random order, and converts a fault of the running thread to an Error.
#include <dlfcn.h>
#include <signal.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <vector>

#include "cluster.h"
#include "device.h"

namespace lors::sim {

namespace {
constexpr uint32_t kMostBlocks = 8;  // of a cluster, on every device that has them
}

Device* Device::current = nullptr;

Device::Device(const Options& o) : options(o), random(o.seed), shared_window_(kMostBlocks * int64_t{Block::kSharedWindow}) {}

int device_multiprocessors() { return Device::current->options.multiprocessors; }
int device_shared_bytes() { return Device::current->options.shared_bytes; }
int device_architecture() { return Device::current->options.architecture; }

namespace {

// ---- faults ----
// A fault can be at any instruction, where nothing may be thrown. The handler makes the thread continue in after_fault, on
// the emptied stack, which leaves for the scheduler.
struct Fault {
  const char* what = nullptr;
  uint64_t code = 0;
};
Fault fault;

void after_fault() {
  Block::thread->fiber.forget_frames();
  // The place in the module, for addr2line.
  Dl_info info{};
  std::string place;
  if (dladdr(reinterpret_cast<void*>(fault.code), &info) != 0 && info.dli_fname != nullptr) {
    char offset[32];
    std::snprintf(offset, sizeof(offset), "+%#llx",
                  static_cast<unsigned long long>(fault.code - reinterpret_cast<uint64_t>(info.dli_fbase)));
    const std::string file = info.dli_fname;
    place = " (by the code at " + file.substr(file.rfind('/') + 1) + offset + ")";
  }
  Block::current->abandon(fault.what + place);
}

void on_fault(int, siginfo_t* info, void* context) {
  const auto address = reinterpret_cast<uint64_t>(info->si_addr);
  const Thread* thread = Block::thread;
  if (thread == nullptr || Block::current == nullptr) {
    // Not a kernel: back to the default action, which the return triggers.
    signal(SIGSEGV, SIG_DFL);
    return;
  }
  if (Block::current->device.shared_window().contains(address))
    fault.what = "raw access to shared memory, past ptx.h";
  else if (Block::current->device.memory.contains(address))
    fault.what = "raw access to global memory, past ptx.h";
  else if (thread->fiber.is_guard(address))
    fault.what = "stack overflow of a simulated thread";
  else
    fault.what = "access to an address that is no memory of the device";
  auto* registers = static_cast<ucontext_t*>(context);
  fault.code = static_cast<uint64_t>(registers->uc_mcontext.gregs[REG_RIP]);
  registers->uc_mcontext.gregs[REG_RIP] = reinterpret_cast<greg_t>(&after_fault);
  registers->uc_mcontext.gregs[REG_RSP] = static_cast<greg_t>((thread->fiber.top() & ~uint64_t{15}) - 8);  // as after a call
}

// Installs on_fault for a scope, on a stack of its own: the thread's may have overflown.
class CatchFaults {
 public:
  CatchFaults() : stack_(64 * 1024) {
    stack_t own{};
    own.ss_sp = stack_.data();
    own.ss_size = stack_.size();
    sigaltstack(&own, &stack_before_);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &segv_before_);
    sigaction(SIGBUS, &action, &bus_before_);
  }
  ~CatchFaults() {
    sigaction(SIGSEGV, &segv_before_, nullptr);
    sigaction(SIGBUS, &bus_before_, nullptr);
    sigaltstack(&stack_before_, nullptr);
  }
  CatchFaults(const CatchFaults&) = delete;
  CatchFaults& operator=(const CatchFaults&) = delete;

 private:
  std::vector<char> stack_;
  stack_t stack_before_{};
  struct sigaction segv_before_{};
  struct sigaction bus_before_{};
};

// ---- grids ----
std::string refusal(const Device& device, dim3 grid, dim3 block, uint32_t cluster, int shared_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || threads == 0) return "a grid or block without threads";
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return "more blocks than a grid may have";
  if (threads > 1024 || block.z > 64) return "more threads than a block may have";
  if (cluster != 1 && device.options.architecture < 90) return "a cluster on a device without clusters";
  if (cluster < 1 || cluster > kMostBlocks) return "more blocks than a cluster may have";
  if (grid.x % cluster != 0) return "a grid that is not a whole number of clusters";
  if (shared_bytes < 0 || shared_bytes > device.options.shared_bytes) return "more shared memory than a block may have";
  return {};
}

// The indices 0 to count - 1 in an order that looks random and needs no memory: steps of a length prime to count.
class Shuffled {
 public:
  Shuffled(uint64_t count, Random& random) : count_(count), at_((uint64_t{random.next()} << 16 | 1) % count) {
    do step_ = 1 + (uint64_t{random.next()} << 16 ^ random.next()) % count;
    while (std::gcd(step_, count) != 1);
  }
  uint64_t next() {
    at_ = (at_ + step_) % count_;
    return at_;
  }

 private:
  uint64_t count_, at_, step_ = 1;
};

}  // namespace

std::string run_grid(const char* name, dim3 grid, dim3 block, uint32_t cluster, int shared_bytes, const void* stream,
                     void (*body)(void*), void* context) {
  Device* device = Device::current;
  if (device == nullptr) throw Error(std::string(name) + " was launched with no simulated device in use");
  if (stream != device) throw Error(std::string(name) + " was not launched on the stream of its CudaHost");
  if (Block::current != nullptr) throw Error(std::string(name) + " was launched from a kernel");
  if (std::string why = refusal(*device, grid, block, cluster, shared_bytes); !why.empty())
    return "lors_cuda could not launch " + std::string(name) + ": " + why + ".";

  const Launch launch{name, grid, block, cluster, shared_bytes, body, context};
  LaunchRecord& record = device->launches.emplace_back();
  record.name = name;
  record.grid = grid;
  record.block = block;
  record.cluster = cluster;
  record.shared_bytes = shared_bytes;

  const CatchFaults faults;
  Cluster simulated(*device, launch);
  device->first_serial = Cluster::next_serial();
  const uint64_t across = grid.x / cluster, count = across * grid.y * grid.z;  // clusters
  const auto run = [&](uint64_t i) {
    simulated.run({static_cast<unsigned>(i % across * cluster), static_cast<unsigned>(i / across % grid.y),
                   static_cast<unsigned>(i / across / grid.y)});
  };
  Shuffled order(count, device->random);
  const auto samples = static_cast<uint64_t>(device->options.sample_blocks);
  if (samples == 0 || count <= samples + 2) {
    for (uint64_t i = 0; i < count; ++i) run(order.next());
  } else {
    std::vector<uint64_t> chosen{0, count - 1};
    while (chosen.size() < samples + 2) {
      const uint64_t i = order.next();
      if (i != 0 && i != count - 1) chosen.push_back(i);
    }
    for (const uint64_t i : chosen) run(i);
  }
  return {};
}

}  // namespace lors::sim
