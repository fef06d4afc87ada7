// What the three depthwise passes say about themselves in the same words.
#pragma once
#include "cpu/kernels/family.h"
#include "depthwise_taps.h"

namespace convext::CONVEXT_ISA {

inline const char* reject_unless_depthwise(const ConvProblem& problem) {
  return problem.is_depthwise() ? nullptr
                                : "it is not depthwise: groups must equal the input channels and divide the output's";
}

// The direct kernel computes one channel a group: a vector's other lanes are wasted. A single channel spread over many
// filters is what the stem kernels are for.
constexpr double kDepthwisePerFlop = 0.1, kOneChannelPerFlop = 3;

inline double depthwise_cost(const Variant& v, const ConvProblem& p) {
  return cost_of(v, p, p.groups == 1 ? kOneChannelPerFlop : kDepthwisePerFlop);
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
      cpu_variant<T>(name, Algorithm::depthwise, pass, reject_unless_depthwise, launch, depthwise_cost)));
}

}  // namespace convext::CONVEXT_ISA
