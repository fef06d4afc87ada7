// What the three depthwise passes say about themselves in the same words.
#pragma once
#include "depthwise_taps.h"

namespace convext::CONVEXT_ISA {

inline const char* reject_unless_depthwise(const ConvProblem& problem) {
  return problem.is_depthwise() ? nullptr
                                : "it is not depthwise: groups must equal the input channels and divide the output's";
}

// The Variant of fprop or dgrad. The packed order is the same in both, so that one packed copy serves both.
template <class T>
constexpr Variant taps_variant(const char* name, Pass pass,
                               const char* (*launch)(const ConvProblem&, const LaunchArgs&)) {
  return {name,
          "depthwise",
          Device::kCPU,
          pass,
          kDType<T>,
          CONVEXT_ISA_ENUM,
          Layouts::kNHWCOnly,
          reject_unless_depthwise,
          nullptr,
          [](const ConvProblem&) { return CONVEXT_FORMAT_NAME(T, depthwise); },
          packed_taps_size<T>,
          pack_taps<T>,
          launch};
}

}  // namespace convext::CONVEXT_ISA
