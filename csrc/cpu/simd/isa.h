// Which instruction set this translation unit is compiled for. The build compiles every kernel file of this folder once
// for each set, with -DCONVEXT_ISA=<set> and the compiler flags that go with it; each copy lives in a namespace of its
// own, so that the linker never mixes them. Kernels are picked at run time by what the CPU offers.
#pragma once
#include "core/variant.h"

#ifndef CONVEXT_ISA
#define CONVEXT_ISA portable
#endif

#define CONVEXT_CONCAT_(a, b) a##_##b
#define CONVEXT_CONCAT(a, b) CONVEXT_CONCAT_(a, b)
#define CONVEXT_STRING_(a) #a
#define CONVEXT_STRING(a) CONVEXT_STRING_(a)

// fprop_direct_f32 -> fprop_direct_f32_avx512, and the same as a string for Variant::name.
#define CONVEXT_VARIANT(base) CONVEXT_CONCAT(base, CONVEXT_ISA)
#define CONVEXT_VARIANT_NAME(base) CONVEXT_STRING(base) "_" CONVEXT_STRING(CONVEXT_ISA)

#if defined(__AVX512BF16__)
#define CONVEXT_ISA_ENUM ::convext::Isa::kAVX512BF16
#elif defined(__AVX512F__)
#define CONVEXT_ISA_ENUM ::convext::Isa::kAVX512
#elif defined(__AVX2__)
#define CONVEXT_ISA_ENUM ::convext::Isa::kAVX2
#else
#define CONVEXT_ISA_ENUM ::convext::Isa::kPortable
#endif
