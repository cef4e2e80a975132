// SPDX-License-Identifier: Apache-2.0
// A simulated GPU: its memory, its options and the records of its launches.
#pragma once

#include <set>
#include <string>

#include "counters.h"
#include "memory.h"
#include "random.h"
#include "shadow.h"

namespace lors::sim {

enum class Landing : uint8_t { early, late, random };  // of asynchronous copies

// How an mma adds. NVIDIA documents neither order nor rounding; these are two models that published experiments agree with:
// the products (8 or 16 at a time) and the accumulator are aligned to the largest exponent among them, cut off 1 or 2 bits
// below a float32's last place, added exactly, and the sum is cut off to a float32. `rounded`: one rounding to nearest.
enum class TensorCores : uint8_t { ampere, hopper, rounded };

struct Options {
  uint64_t seed = 1;
  double preempt = 0;  // probability of preemption at each access
  Landing copies = Landing::random;
  TensorCores tensor_cores = TensorCores::hopper;
  bool race = false;
  bool count = true;
  int multiprocessors = 4;
  int shared_bytes = 227 * 1024;
  int architecture = 80;  // compute capability 8.0
  int sample_blocks = 0;  // > 0: run only the first, the last and so many random blocks or clusters of each launch
};

class Device {
 public:
  explicit Device(const Options& options);

  Options options;
  Memory memory;
  Random random;
  Shadow global_shadow;
  Shadow shared_shadow;
  std::vector<LaunchRecord> launches;  // the last one is running or has run
  uint32_t first_serial = 0;           // of the running launch's blocks

  // Buffers of CudaHost.allocate.
  int scratch_buffers = 0;
  std::set<int> scratch_in_use;
  std::string scratch_misuse;  // to be reported when the call is over

  Window& shared_window() { return shared_window_; }

  static Device* current;  // what launches and device_limits refer to

 private:
  Window shared_window_;
};

// Makes a device the current one for a scope.
class UseDevice {
 public:
  explicit UseDevice(Device& device) : before_(Device::current) { Device::current = &device; }
  ~UseDevice() { Device::current = before_; }
  UseDevice(const UseDevice&) = delete;
  UseDevice& operator=(const UseDevice&) = delete;

 private:
  Device* before_;
};

}  // namespace lors::sim
