// SPDX-License-Identifier: Apache-2.0
// The functions of csrc/core/cuda/launch.h on the simulator. A launch that CUDA would refuse is a Status; a fault of the
// kernel is a lors::sim::Error, which no launcher catches.
#pragma once

#include <utility>

#include "cuda_words.h"

namespace lors::cuda {

inline Status device_limits(DeviceLimits& limits) {
  limits.multiprocessors = sim::device_multiprocessors();
  limits.shared_bytes = sim::device_shared_bytes();
  limits.architecture = sim::device_architecture();
  return {};
}

template <typename... Parameters, typename... Arguments>
Status launch(const char* name, void (*kernel)(Parameters...), LaunchGrid grid, dim3 block, int shared_bytes,
              const CudaHost& host, Arguments... arguments) {
  static_assert((0 + ... + sizeof(Parameters)) <= 4096, "CUDA passes at most 4096 bytes of parameters.");
  auto body = [&] { kernel(arguments...); };
  std::string refusal = sim::run_grid(
      name, grid.blocks, block, grid.cluster, shared_bytes, host.stream,
      [](void* context) { (*static_cast<decltype(body)*>(context))(); }, &body);
  return refusal.empty() ? Status() : Status::error(std::move(refusal));
}

}  // namespace lors::cuda
