// The two ceilings that a kernel's speed is judged against, measured on this machine: one thread each.
#pragma once
#include "core/variant.h"

namespace convext {

struct Roofline {
  double (*fma_flops)(DType dtype, double seconds);   // FLOP/s of independent FMAs on registers
  double (*copy_bytes)(void* dst, const void* src, int64_t bytes, double seconds);  // bytes read and written a second
};

extern const Roofline roofline_portable;
#if defined(CONVEXT_HAVE_X86_ISAS)
extern const Roofline roofline_avx2, roofline_avx512, roofline_avx512_bf16;
#endif

inline const Roofline& roofline_for([[maybe_unused]] Isa isa) {
#if defined(CONVEXT_HAVE_X86_ISAS)
  if (isa == Isa::kAVX512BF16) return roofline_avx512_bf16;
  if (isa == Isa::kAVX512) return roofline_avx512;
  if (isa == Isa::kAVX2) return roofline_avx2;
#endif
  return roofline_portable;
}

}  // namespace convext
