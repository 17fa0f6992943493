// A fiber: a stack of its own and the point where it stopped. Switching is ten instructions; ucontext's swapcontext
// would make two system calls, a hundred times slower.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_acquire(void* address);
extern "C" void __tsan_release(void* address);
// The emulator's own bookkeeping is no business of ThreadSanitizer: it would see edges between CUDA threads that a GPU
// does not make. Functions with this mark touch plain arrays only, no instrumented library code.
#define SIMT_HIDDEN __attribute__((no_sanitize_thread, noinline))
#else
#define SIMT_HIDDEN
#endif

namespace simt {

[[noreturn]] inline void fail(const char* what, unsigned thread) {
  std::fprintf(stderr, "simt: %s (thread %u)\n", what, thread);
  std::abort();
}

// What one CUDA thread did before release(x) is seen by those that acquire(x) later.
inline void release(void* address) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(address);
#else
  (void)address;
#endif
}
inline void acquire(void* address) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(address);
#else
  (void)address;
#endif
}

constexpr size_t kStackBytes = 128 * 1024;

#if defined(__x86_64__)
using Context = void*;
extern "C" void simt_switch(void** from, void* to);
__asm__(
    ".text\n.weak simt_switch\n.type simt_switch,@function\nsimt_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n"
    ".size simt_switch,.-simt_switch\n");

inline void prepare(Context* context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + kStackBytes) & ~uintptr_t(15));
  *--top = nullptr;  // keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
  *context = top;
}
SIMT_HIDDEN inline void switch_context(Context* from, Context* to) { simt_switch(from, *to); }
#else
using Context = ucontext_t;
inline void prepare(Context* context, char* stack, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = kStackBytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}
SIMT_HIDDEN inline void switch_context(Context* from, Context* to) { swapcontext(from, to); }
#endif

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  void* address_sanitizer_stack = nullptr;
  void* thread_sanitizer_fiber = nullptr;
};

// The context that resumes fibers, one an OS thread.
struct Scheduler {
  Context context;
  void* address_sanitizer_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
  void* thread_sanitizer_fiber = nullptr;
};

inline void start(Fiber& fiber, void (*entry)()) {
  if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
  fiber.done = false;
  fiber.address_sanitizer_stack = nullptr;
  prepare(&fiber.context, fiber.stack.get(), entry);
#if defined(__SANITIZE_THREAD__)
  // Kept from block to block, as creating one is dear: it orders thread i of one block before thread i of a later one
  // of the same worker, which is why neighbouring blocks go to different workers.
  if (!fiber.thread_sanitizer_fiber) fiber.thread_sanitizer_fiber = __tsan_create_fiber(0);
#endif
}

SIMT_HIDDEN inline void resume(Scheduler& scheduler, Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler.address_sanitizer_stack, fiber.stack.get(), kStackBytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(fiber.thread_sanitizer_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  switch_context(&scheduler.context, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler.address_sanitizer_stack, nullptr, nullptr);
#endif
}

// First thing on a new fiber's stack.
inline void arrive(Scheduler& scheduler) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack_bottom, &scheduler.stack_size);
#else
  (void)scheduler;
#endif
}

SIMT_HIDDEN inline void suspend(Scheduler& scheduler, Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fiber.address_sanitizer_stack, scheduler.stack_bottom,
                                 scheduler.stack_size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(scheduler.thread_sanitizer_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  switch_context(&fiber.context, &scheduler.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.address_sanitizer_stack, &scheduler.stack_bottom, &scheduler.stack_size);
#endif
}

}  // namespace simt
