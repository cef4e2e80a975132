// SPDX-License-Identifier: Apache-2.0
// Launches kernels for every launcher: raises the shared-memory limit, queues the kernel on the caller's stream and turns
// CUDA's error into a sentence. Never synchronises. The simulator has its own device_limits and launch
// (tests/sim/include/launch_sim.h).
#pragma once

#include <lors/cuda_device.h>
#include <lors/status.h>
#include <lors/types.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#ifdef LORS_SIM
#include <vector_types.h>
#else
#include <cuda_runtime.h>
#endif

namespace lors::cuda {

// The blocks of a launch; with `cluster` > 1 so many neighbours along x form a cluster, on devices that have them
// (has_clusters): they run at the same time and reach each other's shared memory.
struct LaunchGrid {
  LaunchGrid(dim3 all, unsigned per_cluster = 1) : blocks(all), cluster(per_cluster) {}
  dim3 blocks;
  unsigned cluster;
};

}  // namespace lors::cuda

#ifdef LORS_SIM
#include "launch_sim.h"
#else

#include "shared_limit.h"

namespace lors::cuda {

// Limits of the current device.
inline Status device_limits(DeviceLimits& limits) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  int major = 0, minor = 0;
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  limits.architecture = 10 * major + minor;
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // clears it, so that the next launch does not report it
  return Status::error(std::string("CUDA did not describe its device: ") + cudaGetErrorString(error) + ".");
}

// Opts a kernel into all the shared memory of the current device, which CUDA wants from 48 KiB per block on.
inline cudaError_t raise_shared_limit(const void* kernel) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  return once_per_kernel(kernel, device, cudaSuccess, [=] {
    int limit = 0;
    const cudaError_t asked = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return asked != cudaSuccess ? asked : cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
  });
}

// kernel(arguments...) on host.stream; `name` is for the error message.
template <typename... Parameters, typename... Arguments>
Status launch(const char* name, void (*kernel)(Parameters...), LaunchGrid grid, dim3 block, int shared_bytes,
              const CudaHost& host, Arguments... arguments) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024) error = raise_shared_limit(reinterpret_cast<const void*>(kernel));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = grid.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(host.stream);
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;  // older devices refuse the attribute
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (error == cudaSuccess) return {};
  cudaGetLastError();
  return Status::error(std::string("lors_cuda could not launch ") + name + " with " + std::to_string(grid.blocks.x) + " x " +
                       std::to_string(grid.blocks.y) + " x " + std::to_string(grid.blocks.z) + " blocks of " +
                       std::to_string(block.x) + " threads and " + std::to_string(shared_bytes) +
                       " bytes of shared memory: " + cudaGetErrorString(error) + ".");
}

}  // namespace lors::cuda
#endif

namespace lors::cuda {

// Device memory of one call from the caller's CudaHost; `data` is null for 0 floats. Destroyed when the launcher returns: the
// work that uses it is queued then, which is what CudaHost needs.
class Scratch {
 public:
  Scratch(const CudaHost& host, int64_t floats) : host_(host) {
    if (floats > 0) data_ = static_cast<float*>(host.allocate(4 * floats, &handle_));
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (data_) host_.release(handle_);
  }
  float* data() const { return data_; }

 private:
  const CudaHost& host_;
  float* data_ = nullptr;
  void* handle_ = nullptr;
};

inline Status check_no_float64(const char* name, std::initializer_list<DType> dtypes) {
  for (const DType dtype : dtypes)
    if (dtype == DType::float64)
      return Status::error(std::string(name) +
                           " on CUDA takes float32, bfloat16 and float16, and was given float64; convert the tensors or move "
                           "them to the CPU.");
  return {};
}

}  // namespace lors::cuda
