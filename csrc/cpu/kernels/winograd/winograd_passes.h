// fprop and dgrad in terms of winograd.h, and what both refuse.
#pragma once
#include "cpu/kernels/gemm/gemm_passes.h"
#include "winograd.h"
#include "winograd_work.h"

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

// fprop, y = epilogue(x * w): output p reads p - pad + r * dil. dgrad, dx = dy * w with the filter transposed and rotated
// by half a turn: p = h + pad - r * dil, and with r = 2 - r' input h reads h + pad - 2 * dil + r' * dil.
template <class T, int M, Pass PASS>
struct WinogradPass {
  static constexpr bool kDgrad = PASS == Pass::kDgrad;

  static const char* reject(const ConvProblem& p) { return reject_winograd(p, kDgrad ? p.k : p.c); }

  static const char* pack_format(const ConvProblem&) {
    constexpr const char* fprop[] = {CONVEXT_FORMAT_NAME(T, fprop_winograd2x2),
                                     CONVEXT_FORMAT_NAME(T, fprop_winograd3x3),
                                     CONVEXT_FORMAT_NAME(T, fprop_winograd4x4)};
    constexpr const char* dgrad[] = {CONVEXT_FORMAT_NAME(T, dgrad_winograd2x2),
                                     CONVEXT_FORMAT_NAME(T, dgrad_winograd3x3),
                                     CONVEXT_FORMAT_NAME(T, dgrad_winograd4x4)};
    return (kDgrad ? dgrad : fprop)[M - 2];
  }
  static int64_t packed_size(const ConvProblem& p) {
    const Winograd<T> g = winograd(p);
    return winograd_packed_elements<M>(g.depth, g.columns) * int64_t{sizeof(float)};
  }
  static void pack(const ConvProblem& p, const void* w, void* packed, const Parallel& parallel) {
    winograd_pack<M>(winograd(p), static_cast<const T*>(w), static_cast<float*>(packed), parallel);
  }

  static Winograd<T> winograd(const ConvProblem& p) {
    Winograd<T> g{};
    g.batch = p.n, g.depth = kDgrad ? p.k : p.c, g.columns = kDgrad ? p.c : p.k;
    if (kDgrad) {
      g.height = {p.p(), p.h, p.pad_h - 2 * p.dil_h, p.dil_h};
      g.width = {p.q(), p.w, p.pad_w - 2 * p.dil_w, p.dil_w};
    } else {
      g.height = {p.h, p.p(), -p.pad_h, p.dil_h};
      g.width = {p.w, p.q(), -p.pad_w, p.dil_w};
    }
    const int64_t filter = int64_t{p.c} * 9;
    g.column_pitch = kDgrad ? 9 : filter, g.depth_pitch = kDgrad ? filter : 9, g.rotated = kDgrad;
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

  static constexpr Variant variant(const char* name) {
    return winograd_variant(packed_variant<T, WinogradPass>(name, Algorithm::winograd, PASS, reject, winograd_work), M);
  }
};

}  // namespace convext::CONVEXT_ISA
