// The names that a kernel expects from the CUDA compiler and runtime, for g++. Types come from CUDA's own headers.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "emulator.h"

// host_defines.h spells these as attributes that only nvcc understands.
#undef __global__
#undef __device__
#undef __host__
#undef __launch_bounds__
#undef __forceinline__
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

#define threadIdx (::cuda_on_cpu::current->index)
#define blockIdx (::cuda_on_cpu::block.index)
#define blockDim (::cuda_on_cpu::block.dim)
#define gridDim (::cuda_on_cpu::block.grid)

// All shared memory is dynamic.
#define CONVEXT_SHARED_MEMORY(name) unsigned char* const name = ::cuda_on_cpu::shared_memory()

inline void __syncthreads() { ::cuda_on_cpu::barrier(); }

inline void __syncwarp(unsigned mask = ~0u) {
  ::cuda_on_cpu::warp_collective("__syncwarp", mask, nullptr, nullptr, true);
}

template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  struct Argument {
    T in, out;
    int source;
  } argument{value, value, ::cuda_on_cpu::current->lane ^ lane_mask};
  ::cuda_on_cpu::warp_collective("__shfl_xor_sync", mask, &argument, [](void** arguments, uint32_t members) {
    for (int lane = 0; lane < 32; ++lane) {
      if (!(members >> lane & 1)) continue;
      auto* a = static_cast<Argument*>(arguments[lane]);
      if (!(members >> a->source & 1)) ::cuda_on_cpu::fail("__shfl_xor_sync reads a lane outside of the mask");
      a->out = static_cast<Argument*>(arguments[a->source])->in;
    }
  });
  return argument.out;
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  struct Argument {
    bool predicate;
    unsigned out;
  } argument{predicate != 0, 0};
  ::cuda_on_cpu::warp_collective("__ballot_sync", mask, &argument, [](void** arguments, uint32_t members) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if (members >> lane & 1) bits |= unsigned{static_cast<Argument*>(arguments[lane])->predicate} << lane;
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (members >> lane & 1) static_cast<Argument*>(arguments[lane])->out = bits;
    }
  });
  return argument.out;
}

template <class T>
__forceinline__ T __ldg(const T* pointer) {
  return *pointer;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }

namespace convext::cuda {

// Runs the kernel's grid on the CPU. nullptr, or what went wrong; the text lives until the next failure.
template <class... Parameters, class... Arguments>
const char* launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                          Arguments... arguments) {
  static_cast<void>(stream);
  if (::cuda_on_cpu::launch_elsewhere) {
    ::cuda_on_cpu::Parameters packed;
    (packed.add(static_cast<Parameters>(arguments)), ...);
    return ::cuda_on_cpu::launch_elsewhere(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, packed);
  }
  static std::string message;
  try {
    ::cuda_on_cpu::run_grid(grid, block, shared_bytes, [&] { kernel(arguments...); });
  } catch (const ::cuda_on_cpu::Error& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

}  // namespace convext::cuda
