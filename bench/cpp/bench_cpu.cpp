// SPDX-License-Identifier: Apache-2.0
// The core's CPU kernels on one thread: without the effects of a thread pool. The linears of a Llama-3-8B layer
// with both sides a quarter as long. bench/linear.py and bench/merge.py measure all threads, through torch.
#include <lors/cpu.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>

#include "harness.h"

namespace {

struct CpuDevice {
  using Host = const lors::CpuHost*;

  Host host() const { return nullptr; }  // the calling thread alone, memory from the C library
  void* allocate(int64_t bytes) const {
    void* const memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!memory) throw std::bad_alloc();
    return memory;
  }
  void release(void* memory) const { std::free(memory); }
  void upload(void* to, const void* from, int64_t bytes) const { std::memcpy(to, from, bytes); }
  void download(void* to, const void* from, int64_t bytes) const { std::memcpy(to, from, bytes); }
  void copy(void* to, const void* from, int64_t bytes) const { std::memcpy(to, from, bytes); }

  template <typename Function>
  double seconds(Function function) const {
    const auto start = std::chrono::steady_clock::now();
    function();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  // Of the last level, at most 128 MiB: a cache that dozens of cores share is never all this thread's.
  int64_t cache_bytes() const {
    const int64_t size = sysconf(_SC_LEVEL3_CACHE_SIZE);
    return std::clamp<int64_t>(size > 0 ? size : int64_t{32} << 20, int64_t{1} << 20, int64_t{128} << 20);
  }
};

}  // namespace

int main(int argc, char** argv) {
  CpuDevice device;
  benchmark::AddCustomContext("instruction_set", lors::cpu_capability());
  benchmark::AddCustomContext("threads", "1");
  return lors::bench::bench_main(argc, argv, device, {{1024, 1024}, {3584, 1024}}, {128}, 16);
}
