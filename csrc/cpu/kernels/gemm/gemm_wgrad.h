// The weight gradient as a matrix product that reduces over pixels:
//
//   dw[k, (r,s,c)] = sum_{n,p,q} dy[(n,p,q), k] * x[pixel((n,p,q), r, s), c]
//
//   A  (K, NPQ)     dy as it lies in memory: row k of a tile is one element of each pixel, broadcast
//   B  (NPQ, RSC)   x, gathered slab by slab: 96 pixels times one panel of columns in 24 KiB of the first-level cache,
//                   where all tiles of K pass over it. Pixels that meet nothing but padding are left out of the slab,
//                   so a dilated filter costs what its taps inside the image cost.
//   C  (K, RSC)     partial sums in the workspace, turned into KCRS at the end
//
// One item of work is a panel of (r,s,c) columns times a fixed share of the pixels; the shares are a function of the
// problem alone and their partial sums are added in a fixed order, so results do not depend on the number of threads.
#pragma once
#include "gemm.h"

namespace convext::CONVEXT_ISA {

template <class T>
int64_t wgrad_workspace(const ConvProblem&, int32_t threads);

template <class T>
const char* wgrad_launch(const ConvProblem&, const LaunchArgs&);

template <class T>
constexpr Variant wgrad_variant(const char* name, const char* algo, const char* (*reject)(const ConvProblem&)) {
  return {name,   algo,
          Device::kCPU,
          Pass::kWgrad,
          sizeof(T) == 4 ? DType::kFloat32 : DType::kFloat64,
          CONVEXT_ISA_ENUM,
          Layouts::kNHWCOnly,
          reject, wgrad_workspace<T>,
          nullptr, nullptr, nullptr,
          wgrad_launch<T>};
}

}  // namespace convext::CONVEXT_ISA

#define CONVEXT_WGRAD_VARIANTS(base, algo, reject)                                                         \
  namespace convext {                                                                                      \
  extern const Variant CONVEXT_VARIANT(base##_f32) =                                                       \
      CONVEXT_ISA::wgrad_variant<float>(CONVEXT_VARIANT_NAME(base##_f32), algo, CONVEXT_ISA::reject);      \
  extern const Variant CONVEXT_VARIANT(base##_f64) =                                                       \
      CONVEXT_ISA::wgrad_variant<double>(CONVEXT_VARIANT_NAME(base##_f64), algo, CONVEXT_ISA::reject);     \
  }
