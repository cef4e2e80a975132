// SPDX-License-Identifier: Apache-2.0
// cuda_device_supported: asks the driver for the attributes of a kernel that is compiled like all others, and fails where the
// binary has no code for the device. Launches nothing.
#include <cuda_runtime_api.h>
#include <lors/cuda_device.h>

#include <string>

namespace lors {

namespace {
__global__ void architecture_probe() {}

// Names the device's and the built architectures, and the wheel to install (labels: cmake/LorsVersion.cmake).
std::string no_code_for(int index, int major, int minor) {
  const std::string number = std::to_string(major) + std::to_string(minor);
  const std::string found = "CUDA device " + std::to_string(index) + " has architecture sm_" + number +
                            ", and this build of lors_cuda holds code for " LORS_CUDA_ARCHS_TEXT " only; ";
  if (major < 8) return found + "lors_cuda needs sm_80 or newer.";
  const std::string arch = number + (major >= 9 ? "a" : "");  // "a": architecture-specific instructions
  return found + "install the wheel labelled +cu" + std::to_string(CUDART_VERSION / 1000) + ".sm" + arch +
         ", or build it: make wheel CUDA_ARCHS=" + arch + ".";
}
}  // namespace

Status cuda_device_supported(int index) {
  int before = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
  if (error == cudaSuccess) error = cudaSetDevice(index);
  if (error != cudaSuccess) {
    cudaGetLastError();  // clears it, so that the next launch does not report it
    return Status::error("CUDA device " + std::to_string(index) + " cannot be used: " + cudaGetErrorString(error) + ".");
  }
  cudaFuncAttributes attributes{};
  error = cudaFuncGetAttributes(&attributes, architecture_probe);
  cudaGetLastError();
  const cudaError_t restored = cudaSetDevice(before);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction)
    return Status::error(no_code_for(index, major, minor));
  if (error == cudaSuccess) error = restored;
  if (error != cudaSuccess) return Status::error(std::string("CUDA answered: ") + cudaGetErrorString(error) + ".");
  return {};
}

}  // namespace lors
