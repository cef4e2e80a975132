// SPDX-License-Identifier: Apache-2.0
// Once per kernel and device, from any number of host threads. launch.h raises a kernel's limit of dynamic shared memory so:
// a limit set to every launch's own size could be lowered by another thread before this thread's launch, which would fail.
#pragma once

#include <mutex>
#include <set>
#include <utility>

namespace lors::cuda {

// Calls raise() unless it has succeeded for this pair before, and returns its error; `success` where nothing is left to do.
// Under a lock, so that nobody launches before the limit is raised. A failed raise is tried again by the next launch.
template <typename Error, typename Raise>
Error once_per_kernel(const void* kernel, int device, Error success, Raise raise) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> raised;
  const std::lock_guard lock(mutex);
  if (raised.contains({kernel, device})) return success;
  const Error error = raise();
  if (error == success) raised.insert({kernel, device});
  return error;
}

}  // namespace lors::cuda
