// SPDX-License-Identifier: Apache-2.0
// 64-byte aligned scratch memory and a parallel for loop, both from the caller's CpuHost. For the families' .cpp files.
#pragma once

#include <lors/types.h>

#include <cstdlib>
#include <new>

namespace lors::cpu {

class Workspace {
 public:
  Workspace(const CpuHost* host, int64_t bytes) : host_(host) {
    bytes = (bytes + 127) / 64 * 64;  // never zero, and a multiple of the alignment
    if (host_ && host_->allocate) {
      data_ = host_->allocate(bytes, &handle_);
    } else {
      data_ = handle_ = std::aligned_alloc(64, size_t(bytes));
      if (!data_) throw std::bad_alloc();
    }
  }
  ~Workspace() { host_ && host_->allocate ? host_->release(handle_) : std::free(handle_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* data() const { return data_; }

 private:
  const CpuHost* host_;
  void* data_ = nullptr;
  void* handle_ = nullptr;
};

// Runs body(begin, end) over [0, count) on the host's threads, or on the calling thread where the host has none.
template <typename Body>
void parallel_for(const CpuHost* host, int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  if (!host || !host->run || count <= grain) return body(0, count);
  host->run(
      count, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<Body*>(&body));
}

}  // namespace lors::cpu
