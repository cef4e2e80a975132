// SPDX-License-Identifier: Apache-2.0
// Device memory of one call, allocated by the caller's CudaHost and given back when the launcher returns.
#pragma once

#include <lors/types.h>

namespace lors::cuda {

// `data` is null for 0 floats. Destroyed once the work that uses it is queued, not when it has run (see CudaHost).
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

}  // namespace lors::cuda
