// SPDX-License-Identifier: Apache-2.0
// Asks the driver whether the embedded code fits a device, by the attributes of a kernel that is compiled like all others.
#include <cuda_runtime_api.h>
#include <lors/cuda_device.h>

#include <string>

namespace lors {

namespace {
__global__ void architecture_probe() {}
}  // namespace

Status cuda_device_supported(int index) {
  int before = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
  if (error == cudaSuccess) error = cudaSetDevice(index);
  if (error != cudaSuccess) {
    cudaGetLastError();  // clears it: the caller's next launch must not find it
    return Status::error("CUDA device " + std::to_string(index) + " cannot be used: " + cudaGetErrorString(error) + ".");
  }
  cudaFuncAttributes attributes{};
  error = cudaFuncGetAttributes(&attributes, architecture_probe);
  cudaGetLastError();
  const cudaError_t restored = cudaSetDevice(before);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    return Status::error(
        "CUDA device " + std::to_string(index) + " has architecture sm_" + std::to_string(major) + std::to_string(minor) +
        ", and this build of lors_cuda holds code for " LORS_CUDA_ARCHS_TEXT " only; build it with LORS_CUDA_ARCHS=" +
        std::to_string(major) + std::to_string(minor) + ".");
  }
  if (error == cudaSuccess) error = restored;
  if (error != cudaSuccess) return Status::error(std::string("CUDA answered: ") + cudaGetErrorString(error) + ".");
  return {};
}

}  // namespace lors
