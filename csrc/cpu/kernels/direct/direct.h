// Which problems the direct and the dilated kernels take, and what they do.
#pragma once
#include "core/axis.h"
#include "cpu/kernels/family.h"
#include "cpu/kernels/gemm/gemm_passes.h"

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

// Vectors of columns that a pass over the pixels takes at most, looking every pixel of every tap up.
constexpr int64_t kPanelVectors = 3;
// Pixels side by side in a register tile, about.
constexpr int32_t kTilePixels = 14;

// Columns are taps times channels, gathered slab by slab; pixels that meet padding are left out of a slab.
inline void gemm_wgrad_work(const Variant& v, const ConvProblem& p, double share, Work& work) {
  const int64_t columns = p.taps() * p.c_per_group();
  const double pixels = static_cast<double>(p.npq()) * p.groups;
  work[Term::product] += pixels * share * vectors_of(columns, v) * p.k_per_group();
  work[Term::tap] += pixels * p.taps() * share;
  work[Term::gather] += pixels * p.taps() * share * p.c_per_group();
  work[Term::row] += pixels * vectors_of(columns, v);
  work[Term::operand] += static_cast<double>(p.x_size() + p.y_size());
  work[Term::weight] += static_cast<double>(p.w_size());
}

// `share`: of the taps, that some pixel of a tile needs.
inline void gemm_pixels_work(const Variant& v, const ConvProblem& p, double share, Work& work) {
  const bool dgrad = v.pass == Pass::kDgrad;
  const int64_t columns = dgrad ? p.c_per_group() : p.k_per_group(), depth = dgrad ? p.k_per_group() : p.c_per_group();
  const int64_t vectors = (columns + lanes_of(v) - 1) / lanes_of(v);
  const double pixel_taps = static_cast<double>(p.npq()) * p.taps() * p.groups * share;
  const int32_t merged = dgrad ? 1 : GemmFprop<float, false>::merged_taps(p);
  work[Term::product] += pixel_taps * depth * vectors;
  work[Term::tap] += pixel_taps / merged * ((vectors + kPanelVectors - 1) / kPanelVectors);
  if (merged > 1 && p.pad_w > 0) work[Term::gather] += static_cast<double>(p.x_size());
  work[Term::output] += static_cast<double>(dgrad ? p.nhw() : p.npq()) * p.groups * vectors;
  work[Term::operand] += static_cast<double>(dgrad ? p.y_size() : p.x_size());
  work[Term::weight] += static_cast<double>(p.w_size());
}

// A tile skips a tap that none of its pixels needs. Its pixels are neighbours: of one row they need the same rows of
// taps, but seldom the same columns. The dilated kernels' tiles never straddle two rows, the direct ones' do where rows
// are short.
inline void direct_or_dilated_work(const Variant& v, const ConvProblem& p, bool tiles_within_rows, Work& work) {
  const double rows = share_inside(depth_of(p, false).at(0)) * share_inside(height_of(p, false).at(0));
  if (v.pass == Pass::kWgrad) return gemm_wgrad_work(v, p, rows * share_inside(width_of(p, false).at(0)), work);
  const bool one_row = tiles_within_rows || (v.pass == Pass::kDgrad ? p.w : p.q()) >= kTilePixels;
  gemm_pixels_work(v, p, one_row ? rows : 1, work);
}

inline void direct_work(const Variant& v, const ConvProblem& p, Work& work) {
  direct_or_dilated_work(v, p, false, work);
}

inline void dilated_work(const Variant& v, const ConvProblem& p, Work& work) {
  direct_or_dilated_work(v, p, true, work);
}

}  // namespace convext::CONVEXT_ISA
