// mma.sync: one warp multiplies a 16 x K by a K x 8 matrix and adds to a 16 x 8 one, in fp32. K = 16 for 16-bit
// elements, 8 for tf32. Fragments, with g = lane / 4 and t = lane % 4:
//
//   16-bit  a[i]: row g + 8 (i % 2), columns 2t + 8 (i / 2) and the next     b[i]: rows 2t + 8 i and the next, column g
//   tf32    a[i]: row g + 8 (i % 2), column t + 4 (i / 2)                    b[i]: row t + 4 i, column g
//   fp32    d[i]: row g + 8 (i / 2), column 2t + i % 2
#pragma once
#include "cuda/compat.h"

namespace convext::cuda::ptx {

#if defined(CONVEXT_CUDA_ON_CPU)
namespace emulated {

struct MmaArgument {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

template <class T>
inline float element(uint32_t word, int half) {
  const auto bits = static_cast<uint16_t>(word >> (16 * half));
  T value;
  memcpy(static_cast<void*>(&value), &bits, sizeof value);
  return to_accumulate(value);
}
template <>
inline float element<float>(uint32_t word, int) {
  word &= 0xFFFFE000u;  // the tensor core does not look at the 13 low bits
  float value;
  memcpy(&value, &word, sizeof value);
  return value;
}

template <class T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if (::cuda_on_cpu::config.traffic_only) return;
  MmaArgument argument{d, a, b};
  ::cuda_on_cpu::warp_collective("mma.sync", ~0u, &argument, [](void** arguments, uint32_t members) {
    if (members != ~0u) ::cuda_on_cpu::fail("mma.sync needs a whole warp");
    constexpr int PACK = 4 / sizeof(T), K = 8 * PACK;
    float lhs[16][K], rhs[K][8], sum[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto& m = *static_cast<MmaArgument*>(arguments[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int e = 0; e < PACK; ++e) {
        for (int i = 0; i < 4; ++i) lhs[g + 8 * (i % 2)][PACK * t + 4 * PACK * (i / 2) + e] = element<T>(m.a[i], e);
        for (int i = 0; i < 2; ++i) rhs[PACK * t + 4 * PACK * i + e][g] = element<T>(m.b[i], e);
      }
      for (int i = 0; i < 4; ++i) sum[g + 8 * (i / 2)][2 * t + i % 2] = m.d[i];
    }
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < K; ++k) {
        for (int col = 0; col < 8; ++col) sum[row][col] += lhs[row][k] * rhs[k][col];
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const auto& m = *static_cast<MmaArgument*>(arguments[lane]);
      for (int i = 0; i < 4; ++i) m.d[i] = sum[lane / 4 + 8 * (i / 2)][lane % 4 * 2 + i % 2];
    }
    ++::cuda_on_cpu::counters.mma;
  });
}

}  // namespace emulated
#endif

template <class T>
CONVEXT_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(CONVEXT_CUDA_ON_CPU)
  emulated::mma<T>(d, a, b);
#else
#define CONVEXT_MMA(instruction)                                                              \
  asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (DTypeOf<T>::value == DType::kBFloat16) {
    CONVEXT_MMA("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32");
  } else if constexpr (DTypeOf<T>::value == DType::kFloat16) {
    CONVEXT_MMA("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32");
  } else {
    CONVEXT_MMA("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32");
  }
#undef CONVEXT_MMA
#endif
}

// The nearest tf32, ties away from zero; the tensor core itself would cut the low bits off.
CONVEXT_DEVICE uint32_t round_to_tf32(uint32_t bits) {
#if defined(CONVEXT_CUDA_ON_CPU)
  const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
  return finite ? (bits + 0x1000u) & 0xFFFFE000u : bits;
#else
  uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(__uint_as_float(bits)));
  return out;
#endif
}

}  // namespace convext::cuda::ptx
