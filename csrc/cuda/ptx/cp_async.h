// cp.async: global to shared memory, past the registers. A thread's copies are committed in groups, waited for in
// order.
#pragma once
#include "cuda/compat.h"

namespace convext::cuda::ptx {

// The 32-bit address of shared memory that instructions take.
CONVEXT_DEVICE uint32_t shared_address(const void* pointer) {
#if defined(CONVEXT_CUDA_ON_CPU)
  return ::cuda_on_cpu::shared_offset(pointer, 0);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#endif
}

// Copies 16 bytes, or writes 16 zero bytes where `in_bounds` is false; then source is not read.
CONVEXT_DEVICE void cp_async_16(uint32_t destination, const void* source, bool in_bounds) {
#if defined(CONVEXT_CUDA_ON_CPU)
  if (destination % 16) ::cuda_on_cpu::fail("cp.async: the destination is not 16-byte aligned");
  if (in_bounds && reinterpret_cast<uintptr_t>(source) % 16) {
    ::cuda_on_cpu::fail("cp.async: the source is not 16-byte aligned");
  }
  const int bytes = in_bounds ? 16 : 0;
  ::cuda_on_cpu::issue_copy({::cuda_on_cpu::shared_pointer(destination, 16), source, bytes, 16 - bytes});
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(in_bounds ? 16 : 0)
               : "memory");
#endif
}

CONVEXT_DEVICE void cp_async_commit() {
#if defined(CONVEXT_CUDA_ON_CPU)
  ::cuda_on_cpu::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most GROUPS_LEFT of this thread's youngest groups are under way.
template <int GROUPS_LEFT>
CONVEXT_DEVICE void cp_async_wait() {
#if defined(CONVEXT_CUDA_ON_CPU)
  ::cuda_on_cpu::wait_for_copies(GROUPS_LEFT);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS_LEFT) : "memory");
#endif
}

}  // namespace convext::cuda::ptx
