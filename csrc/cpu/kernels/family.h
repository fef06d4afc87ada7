// What CPU kernels say about themselves in the same words.
#pragma once
#include "cpu/simd/half.h"

namespace convext::CONVEXT_ISA {

// The lanes of a vector of what a variant computes in.
inline int64_t lanes_of(const Variant& v) {
  const int64_t bytes = v.isa == Isa::kPortable ? 16 : v.isa == Isa::kAVX2 ? 32 : 64;
  return bytes / (v.arithmetic == Arithmetic::float64 ? 8 : 4);
}

// Vectors that so many lanes fill, the last one in part.
inline double vectors_of(int64_t lanes, const Variant& v) {
  return static_cast<double>((lanes + lanes_of(v) - 1) / lanes_of(v));
}

// A kernel for elements of T in this instruction set, over weights as they are.
template <class T>
constexpr Variant cpu_variant(const char* name, Algorithm algorithm, Pass pass,
                              const char* (*reject)(const ConvProblem&),
                              const char* (*launch)(const ConvProblem&, const LaunchArgs&),
                              void (*work)(const Variant&, const ConvProblem&, Work&),
                              int64_t (*workspace)(const ConvProblem&, int32_t) = nullptr,
                              Layouts layouts = Layouts::kNHWCOnly) {
  const Arithmetic arithmetic = sizeof(compute_t<T>) == 8 ? Arithmetic::float64 : Arithmetic::float32;
  Variant v{name,      algorithm, Device::kCPU, pass,    kDType<T>, arithmetic, CONVEXT_ISA_ENUM, layouts, reject,
            workspace, nullptr,   nullptr,      nullptr, nullptr,   launch};
  v.work = work;
  return v;
}

// The same of a kernel that takes three axes.
constexpr Variant of_volumes(Variant v) {
  v.volumes = true;
  return v;
}

// The same over weights that Packing packs.
template <class Packing>
constexpr Variant packed_by(Variant v) {
  v.pack_format = Packing::pack_format, v.packed_size = Packing::packed_size, v.pack = Packing::pack;
  return v;
}

}  // namespace convext::CONVEXT_ISA

// Defines the Variants <base>_<type>_<instruction set> by an expression that has the element type as T, and its
// Variant's name as `name`: of all types that kernels of this instruction set are built for, or of one.
#define CONVEXT_DEFINE_VARIANTS(base, ...) CONVEXT_FOR_ELEMENTS(CONVEXT_DEFINE_VARIANT_OF, base, __VA_ARGS__)
#define CONVEXT_DEFINE_VARIANT_OF(Type, type, base, ...)         \
  namespace convext {                                            \
  CONVEXT_DEFINE_VARIANT(base##_##type) = [](const char* name) { \
    using T = Type;                                              \
    using namespace CONVEXT_ISA;                                 \
    return __VA_ARGS__;                                          \
  }(CONVEXT_VARIANT_NAME(base##_##type));                        \
  }

// Defines the Variant <base>_<instruction set>: CONVEXT_DEFINE_VARIANT(base) = ...;
#define CONVEXT_DEFINE_VARIANT(base) extern const Variant CONVEXT_VARIANT(base)
