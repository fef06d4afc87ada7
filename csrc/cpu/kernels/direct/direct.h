// Which problems the direct and the dilated kernels take, and what they cost: the direct one's cost is the unit.
#pragma once
#include "core/axis.h"
#include "cpu/kernels/family.h"

namespace convext::CONVEXT_ISA {

inline const char* reject_none(const ConvProblem&) { return nullptr; }

inline const char* reject_undilated(const ConvProblem& p) {
  return p.is_dilated() ? nullptr : "the filter is not dilated";
}

inline double direct_cost(const Variant& v, const ConvProblem& p) { return cost_of(v, p, 1); }

// Share of the filter taps that meet the image rather than the padding, averaged over the outputs.
inline double share_inside(const Axis& axis) {
  if (axis.out <= 0 || axis.taps <= 0) return 1;
  int64_t inside = 0;
  for (int32_t t = 0; t < axis.taps; ++t) {  // 0 <= i * in_step + shift < in
    const int32_t shift = axis.input(0, t), left = axis.in - 1 - shift;
    const int32_t first = shift >= 0 ? 0 : (-shift + axis.in_step - 1) / axis.in_step;
    int32_t last = left < 0 ? -1 : left / axis.in_step;
    if (last > axis.out - 1) last = axis.out - 1;
    if (last >= first) inside += last - first + 1;
  }
  return static_cast<double>(inside) / (static_cast<double>(axis.out) * axis.taps);
}

// Dilated kernels skip the other taps, but a register tile keeps every one that one of its pixels needs. Where all taps
// count they are still preferred to the direct ones, by a little, so that the name says what the filter is.
constexpr double kDilatedSetUp = 0.02, kDilatedPerShare = 1.1, kDilatedMost = 0.99;

inline double dilated_cost(const Variant& v, const ConvProblem& p) {
  const double share = share_inside(depth_of(p, false).at(0)) * share_inside(height_of(p, false).at(0)) *
                       share_inside(width_of(p, false).at(0));
  const double per_flop = kDilatedSetUp + kDilatedPerShare * share;
  return cost_of(v, p, per_flop < kDilatedMost ? per_flop : kDilatedMost);
}

}  // namespace convext::CONVEXT_ISA
