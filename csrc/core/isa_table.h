// One object for each instruction set, and the one for an instruction set that this CPU has.
#pragma once
#include "variant.h"

// Declares what the files in cpu/kernels define as CONVEXT_VARIANT(name), and name_for(isa).
#if defined(CONVEXT_HAVE_X86_ISAS)
#define CONVEXT_ISA_TABLE(Type, name)                                                               \
  extern const Type name##_portable, name##_avx2, name##_avx512;                                    \
  inline const Type& name##_for(Isa isa) {                                                          \
    return isa >= Isa::kAVX512 ? name##_avx512 : isa == Isa::kAVX2 ? name##_avx2 : name##_portable; \
  }
#else
#define CONVEXT_ISA_TABLE(Type, name) \
  extern const Type name##_portable;  \
  inline const Type& name##_for(Isa) { return name##_portable; }
#endif
