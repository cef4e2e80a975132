// SPDX-License-Identifier: Apache-2.0
// What the families' .cpp files share: a 64-byte aligned scratch, and a for-loop over the caller's thread pool.
#pragma once

#include <lors/types.h>

#include <cstdlib>
#include <memory>
#include <new>

namespace lors::cpu {

class Workspace {
 public:
  explicit Workspace(int64_t bytes) : data_(std::aligned_alloc(64, size_t((bytes + 127) / 64 * 64)), &std::free) {
    if (!data_) throw std::bad_alloc();
  }
  void* data() const { return data_.get(); }

 private:
  std::unique_ptr<void, void (*)(void*)> data_;
};

// Runs body(begin, end) over [0, count) on the pool behind `stream`, or here if there is none.
template <typename Body>
void parallel_for(Stream stream, int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  const auto* pool = static_cast<const ParallelFor*>(stream);
  if (!pool || count <= grain) return body(0, count);
  pool->run(
      count, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<Body*>(&body));
}

}  // namespace lors::cpu
