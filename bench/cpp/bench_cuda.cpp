// SPDX-License-Identifier: Apache-2.0
// The core's CUDA kernels without torch and without a benchmark library; bench/gpu/build.sh builds it.
//   bench_cuda                 GB/s of every kernel: the linears of a Llama-3-8B layer, bfloat16, r = 16 and 64
//   bench_cuda --once NAME     one call of the kernel NAME on 4096 x 4096, T = 512: for a profiler
//   bench_cuda --check         every kernel on awkward shapes, outputs poisoned, twice: for sanitizers
// Time is the device's own, between two events; calls are queued back to back, so a kernel shorter than its launch shows the
// launch.
#include <cuda_runtime_api.h>
#include <lors/cuda_device.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string_view>

#include "operand_sets.h"

namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);  // after a CUDA error no later number can be trusted
}

// Workspace for the core: blocks are kept and given out again at once, which one stream allows. Nothing allocates while a
// batch is timed: the calls before it have asked for the same sizes.
struct Block {
  void* memory = nullptr;
  int64_t bytes = 0;
  bool taken = false;
};
std::vector<std::unique_ptr<Block>> blocks;

void* allocate_workspace(int64_t bytes, void** handle) {
  for (const auto& block : blocks) {
    if (block->taken || block->bytes < bytes || block->bytes > 2 * bytes) continue;
    block->taken = true;
    *handle = block.get();
    return block->memory;
  }
  blocks.push_back(std::make_unique<Block>());
  Block& block = *blocks.back();
  check(cudaMalloc(&block.memory, bytes), "workspace");
  block.bytes = bytes;
  block.taken = true;
  *handle = &block;
  return block.memory;
}

void release_workspace(void* handle) { static_cast<Block*>(handle)->taken = false; }

class CudaDevice {
 public:
  using Host = lors::CudaHost;

  CudaDevice() {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream");
    check(cudaEventCreate(&start_), "event");
    check(cudaEventCreate(&stop_), "event");
  }

  Host host() const { return {stream_, allocate_workspace, release_workspace}; }
  void* allocate(int64_t bytes) const {
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes), "operands");
    return memory;
  }
  void release(void* memory) const { check(cudaFree(memory), "free"); }
  void upload(void* to, const void* from, int64_t bytes) const { transfer(to, from, bytes, cudaMemcpyHostToDevice); }
  void download(void* to, const void* from, int64_t bytes) const { transfer(to, from, bytes, cudaMemcpyDeviceToHost); }
  void copy(void* to, const void* from, int64_t bytes) const {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_), "copy");
  }

  template <typename Function>
  double seconds(Function function) const {
    float milliseconds = 0;
    check(cudaEventRecord(start_, stream_), "event");
    function();
    check(cudaEventRecord(stop_, stream_), "event");
    check(cudaEventSynchronize(stop_), "kernel");
    check(cudaEventElapsedTime(&milliseconds, start_, stop_), "event");
    return milliseconds / 1e3;
  }

  int64_t cache_bytes() const {
    int device = 0, bytes = 0;
    check(cudaGetDevice(&device), "device");
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device), "device");
    return std::max(bytes, 1 << 20);
  }

 private:
  void transfer(void* to, const void* from, int64_t bytes, cudaMemcpyKind kind) const {
    check(cudaMemcpyAsync(to, from, bytes, kind, stream_), "transfer");
    check(cudaStreamSynchronize(stream_), "transfer");
  }

  cudaStream_t stream_ = nullptr;
  cudaEvent_t start_ = nullptr, stop_ = nullptr;
};

using namespace lors::bench;
using CudaCall = Call<lors::CudaHost>;

std::vector<std::vector<unsigned char>> results(CudaDevice& device, const CudaCall& call, void* const* operands) {
  std::vector<std::vector<unsigned char>> all;
  for (size_t i = 0; i < call.operands.size(); ++i)
    if (call.operands[i].fill == Fill::poison) {
      all.emplace_back(call.operands[i].bytes());
      device.download(all.back().data(), operands[i], call.operands[i].bytes());
    }
  return all;
}

// Nothing unwritten, and the same bits again. Values are bench/gpu/check.py's business.
lors::Status checked(CudaDevice& device, const CudaCall& call) {
  OperandSets<CudaDevice> sets(device, call.operands, 1);
  lors::Status status = poisoned_call(device, call, sets.first());
  if (!status.ok()) return status;
  const auto first = results(device, call, sets.first());
  status = call.run(sets.first(), device.host());
  if (status.ok() && results(device, call, sets.first()) != first)
    status = lors::Status::error("a second call gave other bits");
  return status;
}

// One line with the median of seven batches.
lors::Status measured(CudaDevice& device, const CudaCall& call, const char* problem) {
  OperandSets<CudaDevice> sets(device, call.operands);
  lors::Status status = poisoned_call(device, call, sets.first());
  const auto batch = [&](int64_t calls) {
    return device.seconds([&] {
      for (int64_t i = 0; i < calls && status.ok(); ++i) status = call.run(sets.next(), device.host());
    });
  };
  const double one = batch(1);
  const auto calls = std::clamp<int64_t>(static_cast<int64_t>(kBatchSeconds / std::min(one, batch(1))) + 1, 1, 1000);
  std::vector<double> seconds;
  for (int i = 0; i < 7 && status.ok(); ++i) seconds.push_back(batch(calls) / static_cast<double>(calls));
  if (!status.ok()) return status;
  std::nth_element(seconds.begin(), seconds.begin() + 3, seconds.end());
  const double rate = static_cast<double>(call.floor_bytes()) / seconds[3];
  std::printf("%-28s %-26s %10.1f us %8.0f GB/s %5.2f of copy %8.1f TFLOP/s\n", call.name.c_str(), problem, seconds[3] * 1e6,
              rate / 1e9, rate / copy_rate(device), call.flop / seconds[3] / 1e12);
  std::fflush(stdout);
  return status;
}

// Calls `visit` with each call of each problem and what it is called; the number of failures, each of which is printed.
template <typename Visit>
int for_calls(const std::vector<Problem>& problems, Visit visit) {
  int failed = 0;
  for (size_t i = 0; i < problems.size(); ++i) {
    const Problem& p = problems[i];
    const bool first = i == 0 || problems[i - 1].out_features != p.out_features ||
                       problems[i - 1].in_features != p.in_features || problems[i - 1].r != p.r ||
                       problems[i - 1].dtype != p.dtype;
    char name[96];
    std::snprintf(name, sizeof name, "%s %lldx%lld r=%lld T=%lld", lors::dtype_name(p.dtype),
                  static_cast<long long>(p.out_features), static_cast<long long>(p.in_features), static_cast<long long>(p.r),
                  static_cast<long long>(p.tokens));
    for (const CudaCall& call : calls_of<lors::CudaHost>(p, first)) {
      const lors::Status status = visit(call, name);
      if (status.ok()) continue;
      std::printf("%-28s %s failed: %s\n", call.name.c_str(), name, status.message().c_str());
      ++failed;
    }
  }
  return failed;
}

int check_all(CudaDevice& device) {
  std::vector<Problem> problems;
  for (const lors::DType dtype : {lors::DType::float32, lors::DType::bfloat16})
    for (const int64_t r : {3, 16, 64})
      for (const auto& [T, N, K] : {std::array<int64_t, 3>{1, 33, 64}, {17, 100, 320}, {129, 130, 544}})
        problems.push_back({T, N, K, r, dtype});
  int calls = 0;
  const int failed = for_calls(problems, [&](const CudaCall& call, const char*) { return ++calls, checked(device, call); });
  std::printf("%d passed, %d failed\n", calls - failed, failed);
  return failed != 0;
}

int measure_all(CudaDevice& device) {
  std::printf("a large copy moves %.0f GB/s, read plus written\n", copy_rate(device) / 1e9);
  std::vector<Problem> problems;
  for (const auto& [N, K] : {std::pair<int64_t, int64_t>{4096, 4096}, {1024, 4096}, {14336, 4096}, {4096, 14336}})
    for (const int64_t r : {16, 64})
      for (const int64_t T : {16, 512, 2048, 8192}) problems.push_back({T, N, K, r, lors::DType::bfloat16});
  return for_calls(problems, [&](const CudaCall& call, const char* name) {
           // Thousands of tokens are matmuls of torch's; the large ones would take most of the time.
           const bool product = call.name.starts_with("fused_linear");
           return product && call.flop > 1e12 ? lors::Status() : measured(device, call, name);
         }) != 0;
}

int run_once(CudaDevice& device, std::string_view wanted) {
  int found = 0;
  const int failed = for_calls({{512, 4096, 4096, 16, lors::DType::bfloat16}}, [&](const CudaCall& call, const char*) {
    if (call.name != wanted) return lors::Status();
    ++found;
    OperandSets<CudaDevice> sets(device, call.operands, 1);
    return poisoned_call(device, call, sets.first());
  });
  if (found == 0) std::fprintf(stderr, "bench_cuda has no kernel called %s.\n", wanted.data());
  return failed != 0 || found == 0;
}

}  // namespace

int main(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "bench_cuda found no CUDA device.\n");
    return 1;
  }
  if (const lors::Status status = lors::cuda_device_supported(0); !status.ok()) {
    std::fprintf(stderr, "%s\n", status.message().c_str());
    return 1;
  }
  CudaDevice device;
  const std::string_view mode = argc > 1 ? argv[1] : "";
  if (mode == "--check") return check_all(device);
  if (mode == "--once" && argc == 3) return run_once(device, argv[2]);
  if (mode.empty()) return measure_all(device);
  std::fprintf(stderr, "usage: bench_cuda [--check | --once NAME]\n");
  return 2;
}
