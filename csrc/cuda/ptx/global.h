// A store of 16 bytes to global memory. Plain C++ asks for the same, but nvcc splits a uint4 that was put together out
// of halves into four stores of a word each.
#pragma once
#include "cuda/compat.h"

namespace convext::cuda::ptx {

CONVEXT_DEVICE void store_global_16(void* destination, const uint4& value) {
#if defined(CONVEXT_CUDA_ON_CPU)
  *static_cast<uint4*>(destination) = value;
#else
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(destination), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
#endif
}

}  // namespace convext::cuda::ptx
