// What CPU kernels say about themselves in the same words, and what they cost beside each other.
#pragma once
#include "cpu/simd/half.h"

namespace convext::CONVEXT_ISA {

// A cost is the problem's FLOP times what a kernel takes for one, in units of what the direct kernel takes in AVX-512.
// That number stands beside each family's kernels, with a function where one number does not do. Where nothing else is
// said, it was fitted on the layers of ResNet-50 and MobileNetV2, not derived: `convext bench layers` shows where the
// choice loses.
//
// Of a FLOP in this instruction set's vectors of floats, and in its own: AVX512-BF16 adds two products at once, and
// what does not multiply that way still reads half the bytes.
#if defined(__AVX512F__)
constexpr double kFloatCost = 1;
#elif defined(__AVX2__)
constexpr double kFloatCost = 2;
#else
constexpr double kFloatCost = 6;
#endif
#if defined(__AVX512BF16__)
constexpr double kVectorCost = 0.5;
#else
constexpr double kVectorCost = kFloatCost;
#endif

// FLOP that go by while an element of an activation is copied, in or out, because it is staged in another type.
constexpr double kStagingFlops = 50;

inline double cost_of(const Variant& v, const ConvProblem& p, double per_flop, double vector_cost = kVectorCost) {
  const double staging = v.is_staged(p) ? kStagingFlops * (p.x_size() + p.y_size()) : 0;
  return (p.flops() * per_flop + staging) * vector_cost;
}

// A kernel for elements of T in this instruction set, over weights as they are.
template <class T>
constexpr Variant cpu_variant(const char* name, Algorithm algorithm, Pass pass,
                              const char* (*reject)(const ConvProblem&),
                              const char* (*launch)(const ConvProblem&, const LaunchArgs&),
                              double (*cost)(const Variant&, const ConvProblem&),
                              int64_t (*workspace)(const ConvProblem&, int32_t) = nullptr,
                              Layouts layouts = Layouts::kNHWCOnly) {
  const Arithmetic arithmetic = sizeof(compute_t<T>) == 8 ? Arithmetic::float64 : Arithmetic::float32;
  return {name,      algorithm, Device::kCPU, pass,    kDType<T>, arithmetic, CONVEXT_ISA_ENUM, layouts, reject,
          workspace, nullptr,   nullptr,      nullptr, cost,      launch};
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
