// What the three depthwise passes say about themselves in the same words.
#pragma once
#include "depthwise_taps.h"

namespace convext::CONVEXT_ISA {

inline const char* reject_unless_depthwise(const ConvProblem& problem) {
  return problem.is_depthwise() ? nullptr
                                : "it is not depthwise: groups must equal the input channels and divide the output's";
}

// The h and w axes of fprop (transposed = false: out is y) or dgrad (out is dx).
inline TapClasses h_classes(const ConvProblem& p, bool transposed) {
  return {transposed ? p.h : p.p(), transposed ? p.p() : p.h, p.r, p.stride_h, p.pad_h, p.dil_h, transposed};
}
inline TapClasses w_classes(const ConvProblem& p, bool transposed) {
  return {transposed ? p.w : p.q(), transposed ? p.q() : p.w, p.s, p.stride_w, p.pad_w, p.dil_w, transposed};
}

// The packed order is the same in fprop and dgrad, so that one packed copy serves both.
inline const char* taps_f32_format(const ConvProblem&) { return CONVEXT_VARIANT_NAME(depthwise_f32); }
inline const char* taps_f64_format(const ConvProblem&) { return CONVEXT_VARIANT_NAME(depthwise_f64); }

}  // namespace convext::CONVEXT_ISA
