// SPDX-License-Identifier: Apache-2.0
// What the CUDA library needs to know of a device: whether this build has code for it, and the limits that tilings depend on.
#pragma once

#include <lors/status.h>

namespace lors {

namespace cuda {

// Tilings (csrc/core/cuda/*_config.h) are pure functions of the problem and these limits.
struct DeviceLimits {
  int multiprocessors = 0;
  int shared_bytes = 0;  // most per block, with opt-in
  int architecture = 0;  // 90 for compute capability 9.0
};

// Whether kernels for this architecture use clusters, mbarriers and bulk copies.
constexpr bool has_clusters(int architecture) { return architecture / 10 == 9 || architecture / 10 == 10; }

}  // namespace cuda

// Success if kernels of this build can run on CUDA device `index`; else an error naming the device's architecture and the built
// ones. Asks the driver; launches and synchronises nothing.
Status cuda_device_supported(int index);

}  // namespace lors
