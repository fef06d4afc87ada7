// The two ceilings that a kernel's speed is judged against, measured on this machine: one thread each.
#pragma once
#include "core/isa_table.h"

namespace convext {

struct Roofline {
  double (*fma_flops)(DType dtype, double seconds);  // FLOP/s of independent FMAs on registers
  double (*copy_bytes)(void* dst, const void* src, int64_t bytes, double seconds);  // bytes read and written a second
};

CONVEXT_ISA_TABLE(Roofline, roofline)

#if defined(CONVEXT_HAVE_X86_ISAS)
extern const Roofline roofline_avx512_bf16;
#endif

}  // namespace convext
