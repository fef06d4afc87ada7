// Compiled for AVX512-BF16, too.
#include "roofline.h"

#include <time.h>

#include "cpu/simd/vec.h"

namespace convext {
namespace CONVEXT_ISA {
namespace {

#if defined(__aarch64__)
#define CONVEXT_VECTOR_REGISTER "w"
#else
#define CONVEXT_VECTOR_REGISTER "v"
#endif

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

// Ten independent chains cover the latency of two FMA units at 4 or 5 cycles, twenty that of two bfloat16 units too;
// the multiplier keeps values finite.
// step(acc, a, b) is the instruction, of kFlops FLOP a lane.
template <class T, int kFlops, class Step>
double flops_of(double seconds, Step step) {
  constexpr int kChains = kVectorRegisters == 32 ? 20 : 10;
  constexpr int64_t kRounds = 100000;
  Vec<T> acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = Vec<T>(T(i));
  Vec<T> a(T(0.5)), b(T(1));
  double best = 0;
  const double start = now();
  do {
    const double begin = now();
    for (int64_t round = 0; round < kRounds; ++round) {
      // The compiler must not see through the loop.
      asm volatile("" : "+" CONVEXT_VECTOR_REGISTER(a.v), "+" CONVEXT_VECTOR_REGISTER(b.v));
      CONVEXT_UNROLL
      for (int i = 0; i < kChains; ++i) acc[i] = step(acc[i], a, b);
    }
    const double rate = 1.0 * kFlops * kChains * Vec<T>::width * kRounds / (now() - begin);
    if (rate > best) best = rate;
  } while (now() - start < seconds);
  for (int i = 0; i < kChains; ++i) asm volatile("" : : CONVEXT_VECTOR_REGISTER(acc[i].v));
  return best;
}

template <class T>
double fma_flops_of(double seconds) {
  return flops_of<T, 2>(seconds, [](Vec<T> acc, Vec<T> a, Vec<T> b) { return fma(b, a, acc); });
}

double fma_flops(DType dtype, double seconds) {
#if defined(__AVX512BF16__)
  if (dtype == DType::kBFloat16) {
    return flops_of<float, 4>(seconds, [](Vec<float> acc, Vec<float> a, Vec<float> b) {
      return Vec<float>(Native<float>::type(_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)));
    });
  }
#endif
  return dtype == DType::kFloat64 ? fma_flops_of<double>(seconds) : fma_flops_of<float>(seconds);
}

double copy_bytes(void* dst, const void* src, int64_t bytes, double seconds) {
  constexpr int64_t kWidth = Vec<float>::width;
  const int64_t count = bytes / int64_t{sizeof(float)} / kWidth * kWidth;
  double best = 0;
  const double start = now();
  do {
    const double begin = now();
    for (int64_t i = 0; i < count; i += kWidth) {
      store(static_cast<float*>(dst) + i, load(static_cast<const float*>(src) + i));
    }
    const double rate = 2.0 * count * sizeof(float) / (now() - begin);
    if (rate > best) best = rate;
  } while (now() - start < seconds);
  return best;
}

}  // namespace
}  // namespace CONVEXT_ISA

extern const Roofline CONVEXT_VARIANT(roofline);
const Roofline CONVEXT_VARIANT(roofline) = {CONVEXT_ISA::fma_flops, CONVEXT_ISA::copy_bytes};

}  // namespace convext
