// fprop and dgrad in terms of winograd.h, and what both refuse.
#pragma once
#include "cpu/kernels/gemm/gemm_passes.h"
#include "winograd.h"
#include "winograd_cost.h"

namespace convext::CONVEXT_ISA {

// With fewer channels to sum over, the transforms' rounding is not yet outweighed by the shorter sums, and takes longer
// than the multiplications that it saves.
constexpr int32_t kWinogradDepth = 32;

inline const char* reject_winograd(const ConvProblem& p, int32_t depth) {
  if (p.r != 3 || p.s != 3) return "Winograd F(m x m, 3x3) needs a 3x3 filter";
  if (!p.is_unit_stride()) return "Winograd needs stride 1";
  if (p.groups != 1) return "Winograd needs groups = 1";
  if (depth < kWinogradDepth) return "Winograd needs at least 32 channels to sum over";
  if (p.p() <= 0 || p.q() <= 0) return "the output is empty";
  return nullptr;
}

// y = epilogue(x * w): output p reads p - pad + r * dil.
template <class T, int M>
struct WinogradFprop {
  static const char* reject(const ConvProblem& p) { return reject_winograd(p, p.c); }

  static const char* pack_format(const ConvProblem&) {
    return M == 2   ? CONVEXT_FORMAT_NAME(T, fprop_winograd2x2)
           : M == 3 ? CONVEXT_FORMAT_NAME(T, fprop_winograd3x3)
                    : CONVEXT_FORMAT_NAME(T, fprop_winograd4x4);
  }
  static int64_t packed_size(const ConvProblem& p) {
    return winograd_packed_elements<M>(p.c, p.k) * int64_t{sizeof(float)};
  }
  static void pack(const ConvProblem& p, const void* w, void* packed, const Parallel& parallel) {
    winograd_pack<M>(winograd(p), static_cast<const T*>(w), static_cast<float*>(packed), parallel);
  }

  static Winograd<T> winograd(const ConvProblem& p) {
    Winograd<T> g{};
    g.batch = p.n, g.depth = p.c, g.columns = p.k;
    g.height = {p.h, p.p(), -p.pad_h, p.dil_h};
    g.width = {p.w, p.q(), -p.pad_w, p.dil_w};
    g.column_pitch = int64_t{p.c} * 9, g.depth_pitch = 9, g.rotated = false;
    return g;
  }
  static int64_t workspace(const ConvProblem& p, int32_t threads) {
    return winograd_workspace<M>(winograd(p), threads);
  }
  static const char* launch(const ConvProblem& p, const LaunchArgs& args) {
    Winograd<T> g = winograd(p);
    g.in = static_cast<const T*>(args.a), g.out = static_cast<T*>(args.out);
    g.packed = static_cast<const float*>(args.b);
    g.epilogue = args.epilogue;
    g.weights = args.weights;
    return run_winograd<M>(g, args.workspace, *args.parallel);
  }
};

// dx = dy * w with the filter transposed and rotated by half a turn: p = h + pad - r * dil, and with r = 2 - r' input h
// reads h + pad - 2 * dil + r' * dil.
template <class T, int M>
struct WinogradDgrad {
  static const char* reject(const ConvProblem& p) { return reject_winograd(p, p.k); }

  static const char* pack_format(const ConvProblem&) {
    return M == 2   ? CONVEXT_FORMAT_NAME(T, dgrad_winograd2x2)
           : M == 3 ? CONVEXT_FORMAT_NAME(T, dgrad_winograd3x3)
                    : CONVEXT_FORMAT_NAME(T, dgrad_winograd4x4);
  }
  static int64_t packed_size(const ConvProblem& p) {
    return winograd_packed_elements<M>(p.k, p.c) * int64_t{sizeof(float)};
  }
  static void pack(const ConvProblem& p, const void* w, void* packed, const Parallel& parallel) {
    winograd_pack<M>(winograd(p), static_cast<const T*>(w), static_cast<float*>(packed), parallel);
  }

  static Winograd<T> winograd(const ConvProblem& p) {
    Winograd<T> g{};
    g.batch = p.n, g.depth = p.k, g.columns = p.c;
    g.height = {p.p(), p.h, p.pad_h - 2 * p.dil_h, p.dil_h};
    g.width = {p.q(), p.w, p.pad_w - 2 * p.dil_w, p.dil_w};
    g.column_pitch = 9, g.depth_pitch = int64_t{p.c} * 9, g.rotated = true;
    return g;
  }
  static int64_t workspace(const ConvProblem& p, int32_t threads) {
    return winograd_workspace<M>(winograd(p), threads);
  }
  static const char* launch(const ConvProblem& p, const LaunchArgs& args) {
    Winograd<T> g = winograd(p);
    g.in = static_cast<const T*>(args.a), g.out = static_cast<T*>(args.out);
    g.packed = static_cast<const float*>(args.b);
    g.weights = args.weights;
    return run_winograd<M>(g, args.workspace, *args.parallel);
  }
};

}  // namespace convext::CONVEXT_ISA

// Defines the Variants <pass>_winograd<2x2, 3x3, 4x4>_<type> of this instruction set.
#define CONVEXT_WINOGRAD_VARIANTS(prefix, pass, Impl)                                \
  CONVEXT_FOR_WINOGRAD(CONVEXT_WINOGRAD_VARIANT, prefix, pass, Impl, 2, winograd2x2) \
  CONVEXT_FOR_WINOGRAD(CONVEXT_WINOGRAD_VARIANT, prefix, pass, Impl, 3, winograd3x3) \
  CONVEXT_FOR_WINOGRAD(CONVEXT_WINOGRAD_VARIANT, prefix, pass, Impl, 4, winograd4x4)
#define CONVEXT_WINOGRAD_VARIANT(T, type, prefix, pass, Impl, M, tile)                                        \
  namespace convext {                                                                                         \
  CONVEXT_DEFINE_VARIANT(prefix##_##tile##_##type) = CONVEXT_ISA::winograd_variant(                           \
      CONVEXT_ISA::packed_variant<T, CONVEXT_ISA::Impl<T, M>>(CONVEXT_VARIANT_NAME(prefix##_##tile##_##type), \
                                                              Algorithm::winograd, pass,                      \
                                                              CONVEXT_ISA::Impl<T, M>::reject,                \
                                                              CONVEXT_ISA::winograd_cost),                    \
      M);                                                                                                     \
  }
