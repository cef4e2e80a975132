// SPDX-License-Identifier: Apache-2.0
// csrc/core/cuda/device.cu over a machine of made-up devices: what it says of each, and that it leaves the current device
// alone.
#define __global__
#define LORS_CUDA_ARCHS_TEXT "80,90a"
#include "cuda/device.cu"

#include <cstdio>

namespace {

struct Device {
  int major, minor;
  cudaError_t probe;  // what the driver answers when asked for a kernel's code
};
constexpr Device devices[] = {{8, 6, cudaSuccess},
                              {7, 5, cudaErrorNoKernelImageForDevice},
                              {10, 0, cudaErrorNoKernelImageForDevice},
                              {12, 1, cudaErrorInvalidDeviceFunction},
                              {8, 0, cudaErrorNoKernelImageForDevice}};
constexpr int count = sizeof(devices) / sizeof(devices[0]);
int current = 3;

}  // namespace

cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  current = device;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "invalid device ordinal"; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device >= count) return cudaErrorInvalidDevice;
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? devices[device].major : devices[device].minor;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)()) { return devices[current].probe; }

// One line per device, and one for a device that is not there.
int main() {
  for (int index = 0; index <= count; ++index) {
    const std::string message = lors::cuda_device_supported(index).message();
    std::puts(current == 3 ? message.c_str() : "the current device was changed");
  }
}
