// SPDX-License-Identifier: Apache-2.0
#include "fiber.h"

#include <sys/mman.h>

#include <new>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "The simulator switches stacks on x86-64 only."
#endif

// Saves the registers that a call preserves on the stack in use, stores the stack pointer to *save, and continues at `to`.
extern "C" void lors_sim_switch(void** save, void* to);
asm(R"(
.text
.globl lors_sim_switch
.hidden lors_sim_switch
.type lors_sim_switch,@function
lors_sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size lors_sim_switch,.-lors_sim_switch
)");

namespace lors::sim {

namespace {
constexpr size_t kStack = 256 * 1024;
constexpr size_t kGuard = 4096;

// All simulation happens on one thread of the process, in one scheduler at a time.
Fiber* running = nullptr;
void* scheduler_pointer = nullptr;

// Stacks of destroyed fibers, kept for the next launch.
std::vector<char*> spare_stacks;

// AddressSanitizer must be informed of every change of stack.
#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
void leaving(void** save, const void* to, size_t bytes) { __sanitizer_start_switch_fiber(save, to, bytes); }
void arrived(void* saved, const void** from, size_t* bytes) { __sanitizer_finish_switch_fiber(saved, from, bytes); }
void unpoison(void* p, size_t bytes) { __asan_unpoison_memory_region(p, bytes); }
#endif
}  // namespace

Fiber::~Fiber() {
  if (stack_ != nullptr) spare_stacks.push_back(stack_);
}

void Fiber::start(Entry entry) {
  if (stack_ == nullptr && !spare_stacks.empty()) {
    stack_ = spare_stacks.back();
    spare_stacks.pop_back();
  }
  if (stack_ == nullptr) {
    void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    stack_ = static_cast<char*>(p);
    mprotect(stack_, kGuard, PROT_NONE);
  }
  forget_frames();
  entry_ = entry;
  // As lors_sim_switch would have left it: six registers and the address to return to. The slot above keeps the stack
  // aligned as after a call.
  void** slot = reinterpret_cast<void**>(stack_ + kStack - 64);
  *--slot = nullptr;
  *--slot = reinterpret_cast<void*>(&Fiber::enter);
  for (int i = 0; i < 6; ++i) *--slot = nullptr;
  stack_pointer_ = slot;
}

void Fiber::enter() {
#if defined(__SANITIZE_ADDRESS__)
  arrived(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  running->entry_();
  __builtin_trap();  // entry must not return
}

void Fiber::resume() {
  running = this;
#if defined(__SANITIZE_ADDRESS__)
  void* saved = nullptr;
  leaving(&saved, stack_, kStack);
#endif
  lors_sim_switch(&scheduler_pointer, stack_pointer_);
#if defined(__SANITIZE_ADDRESS__)
  arrived(saved, nullptr, nullptr);
#endif
  running = nullptr;
}

void Fiber::leave([[maybe_unused]] bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
  leaving(for_good ? nullptr : &sanitizer_stack_, scheduler_stack, scheduler_stack_bytes);
#endif
  lors_sim_switch(&stack_pointer_, scheduler_pointer);
#if defined(__SANITIZE_ADDRESS__)
  arrived(sanitizer_stack_, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

bool Fiber::is_guard(uint64_t address) const {
  return stack_ != nullptr && address - reinterpret_cast<uint64_t>(stack_) < kGuard;
}

uint64_t Fiber::top() const { return reinterpret_cast<uint64_t>(stack_) + kStack - 64; }

void Fiber::forget_frames() {
#if defined(__SANITIZE_ADDRESS__)
  unpoison(stack_ + kGuard, kStack - kGuard);
#endif
}

}  // namespace lors::sim
