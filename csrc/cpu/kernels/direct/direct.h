// Which problems the direct and the dilated kernels take, and what they do.
#pragma once
#include "core/axis.h"
#include "cpu/kernels/family.h"

namespace convext::CONVEXT_ISA {

inline const char* reject_none(const ConvProblem&) { return nullptr; }

inline const char* reject_undilated(const ConvProblem& p) {
  return p.is_dilated() ? nullptr : "the filter is not dilated";
}

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

// Passes over the pixels of a tile, each of which looks every pixel of every tap up: by panels of at most that many
// vectors.
constexpr int64_t kPanelVectors = 3;

inline void gemm_work(const Variant& v, const ConvProblem& p, double share, Work& work) {
  const double pixel_taps = static_cast<double>(p.npq()) * p.taps() * p.groups * share;
  work[Term::weight] += static_cast<double>(p.w_size());
  if (v.pass == Pass::kWgrad) {  // columns are taps times channels, gathered slab by slab
    const int64_t columns = p.taps() * p.c_per_group();
    work[Term::product] += static_cast<double>(p.npq()) * p.groups * share * vectors_of(columns, v) * p.k_per_group();
    work[Term::tap] += pixel_taps;
    work[Term::gather] += pixel_taps * p.c_per_group();
    work[Term::row] += static_cast<double>(p.npq()) * p.groups * vectors_of(columns, v);
    work[Term::operand] += static_cast<double>(p.x_size() + p.y_size());
    return;
  }
  const bool dgrad = v.pass == Pass::kDgrad;
  const int64_t columns = dgrad ? p.c_per_group() : p.k_per_group(), depth = dgrad ? p.k_per_group() : p.c_per_group();
  const int64_t vectors = (columns + lanes_of(v) - 1) / lanes_of(v);
  work[Term::product] += pixel_taps * depth * vectors;
  work[Term::tap] += pixel_taps * ((vectors + kPanelVectors - 1) / kPanelVectors);
  work[Term::output] += static_cast<double>(dgrad ? p.nhw() : p.npq()) * p.groups * vectors;
  work[Term::operand] += static_cast<double>(dgrad ? p.y_size() : p.x_size());
}

inline double share_of_taps_inside(const ConvProblem& p) {
  return share_inside(depth_of(p, false).at(0)) * share_inside(height_of(p, false).at(0)) *
         share_inside(width_of(p, false).at(0));
}

// Both skip taps that meet padding alone, the dilated kernels row by row: what is left of that is for the table to say.
inline void direct_work(const Variant& v, const ConvProblem& p, Work& work) {
  gemm_work(v, p, share_of_taps_inside(p), work);
}

inline void dilated_work(const Variant& v, const ConvProblem& p, Work& work) {
  gemm_work(v, p, share_of_taps_inside(p), work);
}

}  // namespace convext::CONVEXT_ISA
