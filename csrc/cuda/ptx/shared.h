// Loads and stores of shared memory by its 32-bit address: a generic pointer would be converted again and again.
#pragma once
#include "cp_async.h"

namespace convext::cuda::ptx {

CONVEXT_DEVICE uint32_t load_shared(uint32_t address) {
#if defined(CONVEXT_CUDA_ON_CPU)
  if (address % 4) ::cuda_on_cpu::fail("ld.shared: the address is not 4-byte aligned");
  return *reinterpret_cast<const uint32_t*>(::cuda_on_cpu::shared_pointer(address, 4));
#else
  uint32_t out;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(out) : "r"(address) : "memory");
  return out;
#endif
}

CONVEXT_DEVICE uint2 load_shared_8(uint32_t address) {
#if defined(CONVEXT_CUDA_ON_CPU)
  if (address % 8) ::cuda_on_cpu::fail("ld.shared: the address is not 8-byte aligned");
  return *reinterpret_cast<const uint2*>(::cuda_on_cpu::shared_pointer(address, 8));
#else
  uint2 out;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(out.x), "=r"(out.y) : "r"(address) : "memory");
  return out;
#endif
}

CONVEXT_DEVICE uint4 load_shared_16(uint32_t address) {
#if defined(CONVEXT_CUDA_ON_CPU)
  if (address % 16) ::cuda_on_cpu::fail("ld.shared: the address is not 16-byte aligned");
  return *reinterpret_cast<const uint4*>(::cuda_on_cpu::shared_pointer(address, 16));
#else
  uint4 out;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
               : "r"(address)
               : "memory");
  return out;
#endif
}

CONVEXT_DEVICE void store_shared_8(uint32_t address, const uint2& value) {
#if defined(CONVEXT_CUDA_ON_CPU)
  if (address % 8) ::cuda_on_cpu::fail("st.shared: the address is not 8-byte aligned");
  *reinterpret_cast<uint2*>(::cuda_on_cpu::shared_pointer(address, 8)) = value;
#else
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(value.x), "r"(value.y) : "memory");
#endif
}

CONVEXT_DEVICE void store_shared_16(uint32_t address, const uint4& value) {
#if defined(CONVEXT_CUDA_ON_CPU)
  if (address % 16) ::cuda_on_cpu::fail("st.shared: the address is not 16-byte aligned");
  *reinterpret_cast<uint4*>(::cuda_on_cpu::shared_pointer(address, 16)) = value;
#else
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
#endif
}

}  // namespace convext::cuda::ptx
