// SPDX-License-Identifier: Apache-2.0
// What the CUDA half asks of a device: whether this build holds code for it, and what configurations depend on.
#pragma once

#include <lors/status.h>

namespace lors {

namespace cuda {

// Configurations (csrc/core/cuda/*_config.h) are pure functions of the problem and of this.
struct DeviceLimits {
  int multiprocessors = 0;
  int shared_bytes = 0;  // of one block, opted in
};

}  // namespace cuda

// Success if kernels of this build can run on CUDA device `index`; else a sentence naming the device's architecture and the
// built ones. Asks the driver, launches nothing, synchronises nothing.
Status cuda_device_supported(int index);

}  // namespace lors
