#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
}
#define CONVEXT_ASAN(call) call
#else
#define CONVEXT_ASAN(call)
#endif

// Saves the callee-saved registers and the stack pointer in *save and goes on from `to`.
extern "C" void convext_switch_stack(void** save, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.type convext_switch_stack, @function
convext_switch_stack:
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
)");
static constexpr int kSavedWords = 6;  // below the return address
static constexpr int kReturnWord = 6;
#elif defined(__aarch64__)
asm(R"(
.text
.type convext_switch_stack, %function
convext_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
static constexpr int kSavedWords = 20;
static constexpr int kReturnWord = 11;  // x30
#else
#error "cuda_on_cpu knows how to switch stacks on x86-64 and aarch64"
#endif

namespace cuda_on_cpu {
namespace {

constexpr size_t kPage = 4096;
void* scheduler_stack_pointer;
[[maybe_unused]] void* scheduler_fake_stack;
[[maybe_unused]] const void* scheduler_bottom;
[[maybe_unused]] size_t scheduler_size;

}  // namespace

Fiber::Fiber() {
  void* memory =
      mmap(nullptr, kStackBytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) abort();
  mprotect(memory, kPage, PROT_NONE);
  stack_ = static_cast<char*>(memory) + kPage;
}

Fiber::~Fiber() { munmap(stack_ - kPage, kStackBytes + kPage); }

void Fiber::prepare(void (*entry)(), unsigned stagger) {
  // As if entry() had been called: a 16-byte aligned frame whose own return address is never used.
  void** top = reinterpret_cast<void**>(stack_ + kStackBytes - 64 - (stagger % 61) * 192);
  *--top = nullptr;
#if defined(__x86_64__)
  *--top = reinterpret_cast<void*>(entry);
  top -= kSavedWords;
#else
  *--top = nullptr;
  top -= kSavedWords;
  top[kReturnWord] = reinterpret_cast<void*>(entry);
#endif
  static_cast<void>(kReturnWord);
  stack_pointer_ = top;
}

void Fiber::resume() {
  CONVEXT_ASAN(__sanitizer_start_switch_fiber(&scheduler_fake_stack, stack_, kStackBytes));
  convext_switch_stack(&scheduler_stack_pointer, stack_pointer_);
  CONVEXT_ASAN(__sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr));
}

void Fiber::suspend([[maybe_unused]] bool finish) {
  CONVEXT_ASAN(__sanitizer_start_switch_fiber(finish ? nullptr : &fake_stack_, scheduler_bottom, scheduler_size));
  convext_switch_stack(&stack_pointer_, scheduler_stack_pointer);
  CONVEXT_ASAN(__sanitizer_finish_switch_fiber(fake_stack_, &scheduler_bottom, &scheduler_size));
}

void Fiber::enter() { CONVEXT_ASAN(__sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size)); }

}  // namespace cuda_on_cpu
