// ldmatrix: four 8x8 matrices of 16-bit elements from shared memory into the fragments that mma takes.
#pragma once
#include "cp_async.h"

namespace convext::cuda::ptx {

#if defined(CONVEXT_CUDA_ON_CPU)
namespace emulated {

struct LdmatrixArgument {
  uint32_t* out;
  uint32_t address;
};

// Lanes 8m .. 8m+7 give the row addresses of matrix m; lane l gets elements (l/4, 2(l%4)) and (l/4, 2(l%4)+1) of each.
template <bool TRANSPOSED>
inline void ldmatrix_x4(uint32_t (&out)[4], uint32_t address) {
  if (address % 16) ::cuda_on_cpu::fail("ldmatrix: a row is not 16-byte aligned");
  if (::cuda_on_cpu::race.access) {
    ::cuda_on_cpu::race.access(::cuda_on_cpu::shared_pointer(address, 16), 16, false);
  }
  if (::cuda_on_cpu::config.traffic_only) return void(memset(out, 0, sizeof out));
  LdmatrixArgument argument{out, address};
  ::cuda_on_cpu::warp_collective(TRANSPOSED ? "ldmatrix.trans" : "ldmatrix", ~0u, &argument,
                                 [](void** arguments, uint32_t) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t tile[8][8];
      for (int row = 0; row < 8; ++row) {
        const auto* a = static_cast<LdmatrixArgument*>(arguments[matrix * 8 + row]);
        memcpy(tile[row], ::cuda_on_cpu::shared_pointer(a->address, 16), 16);
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int row = lane / 4, col = lane % 4 * 2;
        const uint32_t low = TRANSPOSED ? tile[col][row] : tile[row][col];
        const uint32_t high = TRANSPOSED ? tile[col + 1][row] : tile[row][col + 1];
        static_cast<LdmatrixArgument*>(arguments[lane])->out[matrix] = low | high << 16;
      }
    }
  });
}

}  // namespace emulated
#endif

CONVEXT_DEVICE void ldmatrix_x4(uint32_t (&out)[4], uint32_t address) {
#if defined(CONVEXT_CUDA_ON_CPU)
  emulated::ldmatrix_x4<false>(out, address);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
#endif
}

CONVEXT_DEVICE void ldmatrix_x4_trans(uint32_t (&out)[4], uint32_t address) {
#if defined(CONVEXT_CUDA_ON_CPU)
  emulated::ldmatrix_x4<true>(out, address);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
#endif
}

}  // namespace convext::cuda::ptx
