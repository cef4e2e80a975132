// SPDX-License-Identifier: Apache-2.0
// The core's CUDA kernels on the current device: the linears of a Llama-3-8B layer, r = 16. Time is the device's own, between
// two events; calls are queued back to back, so a kernel shorter than its launch shows the launch.
#include <cuda_runtime_api.h>
#include <lors/cuda_device.h>

#include <cstdio>
#include <cstdlib>

#include "harness.h"

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
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0), "device");
  int driver = 0;
  check(cudaDriverGetVersion(&driver), "driver");
  benchmark::AddCustomContext("device", properties.name);
  benchmark::AddCustomContext("cuda_driver", std::to_string(driver));
  benchmark::AddCustomContext("cuda_runtime", std::to_string(CUDART_VERSION));
  CudaDevice device;
  return lors::bench::bench_main(argc, argv, device, {{4096, 4096}, {1024, 4096}, {14336, 4096}, {4096, 14336}},
                                 {512, 2048, 8192}, 16);
}
