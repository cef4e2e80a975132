// SPDX-License-Identifier: Apache-2.0
// Whether this build of the CUDA half holds code for a device.
#pragma once

#include <lors/status.h>

namespace lors {

// Success if kernels of this build can run on CUDA device `index`; else a sentence naming the device's architecture and the
// built ones. Asks the driver, launches nothing, synchronises nothing.
Status cuda_device_supported(int index);

}  // namespace lors
