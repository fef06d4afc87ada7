// What the three depthwise passes say about themselves in the same words.
#pragma once
#include "cpu/kernels/family.h"
#include "depthwise_taps.h"

namespace convext::CONVEXT_ISA {

inline const char* reject_unless_depthwise(const ConvProblem& problem) {
  return problem.is_depthwise() ? nullptr
                                : "it is not depthwise: groups must equal the input channels and divide the output's";
}

// Whether the tiles that load an input once for all of a row's taps serve, or the general ones.
inline bool takes_windows(const Variant& v, const ConvProblem& p) {
  return p.k == p.c && p.k >= lanes_of(v) && p.s <= 7 && p.stride_w <= 2 && (p.s == 1 || p.dil_w == 1);
}

inline void depthwise_work(const Variant& v, const ConvProblem& p, Work& work) {
  const double vectors = vectors_of(p.k, v), pixels = static_cast<double>(p.npq());
  const double products = pixels * p.taps() * vectors;
  work[Term::product] += products;
  if (!takes_windows(v, p)) work[Term::reload] += products;
  if (p.k != p.c) work[Term::gather] += products;  // an input is spread over its filters' lanes as it is loaded
  work[Term::output] += pixels * vectors;
  work[Term::operand] += static_cast<double>(p.x_size());
  work[Term::weight] += static_cast<double>(p.w_size());
}

// The packed order is the same in fprop and dgrad, so that one packed copy serves both.
template <class T>
struct TapPacking {
  static const char* pack_format(const ConvProblem&) { return CONVEXT_FORMAT_NAME(T, depthwise); }
  static constexpr auto packed_size = packed_taps_size<T>;
  static constexpr auto pack = pack_taps<T>;
};

// What fprop and dgrad are.
template <class T>
TapSum<T> tap_sum(const ConvProblem& p, const LaunchArgs& args, bool dgrad) {
  return {depth_of(p, dgrad),
          height_of(p, dgrad),
          width_of(p, dgrad),
          p.n,
          p.k,
          p.k / p.c,
          static_cast<const T*>(args.a),
          static_cast<const compute_t<T>*>(args.b),
          static_cast<T*>(args.out),
          args.epilogue};
}

// The Variant of fprop or dgrad.
template <class T>
constexpr Variant taps_variant(const char* name, Pass pass,
                               const char* (*launch)(const ConvProblem&, const LaunchArgs&)) {
  return of_volumes(packed_by<TapPacking<T>>(
      cpu_variant<T>(name, Algorithm::depthwise, pass, reject_unless_depthwise, launch, depthwise_work)));
}

}  // namespace convext::CONVEXT_ISA
