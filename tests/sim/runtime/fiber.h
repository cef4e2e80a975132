// SPDX-License-Identifier: Apache-2.0
// A stack of its own for each simulated thread, and the switch between it and the scheduler.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lors::sim {

class Fiber {
 public:
  using Entry = void (*)();
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes the next resume() call entry() on this fiber's stack. entry must end in leave(true). A fiber may be restarted
  // before its last entry ended: what was on the stack is gone, destructors do not run.
  void start(Entry entry);
  // Called by the scheduler: runs the fiber until it leaves.
  void resume();
  // Called by the fiber: back to the scheduler.
  void leave(bool for_good);

  // Whether a faulting address is the guard page below the stack.
  bool is_guard(uint64_t address) const;
  // A stack pointer at which abandoned code may be replaced by a call.
  uint64_t top() const;
  // To be called first on a stack that was taken over at top().
  void forget_frames();

 private:
  static void enter();

  Entry entry_ = nullptr;
  char* stack_ = nullptr;
  void* stack_pointer_ = nullptr;
  void* sanitizer_stack_ = nullptr;
};

}  // namespace lors::sim
