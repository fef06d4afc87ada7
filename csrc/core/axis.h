// Which input each tap of each output reads, along one spatial axis: the one affine map that kernels of fprop and dgrad
// share, on the CPU and on CUDA, for every filter, stride, padding and dilation. Triton's state it with the same names.
//
//   position i, 0 <= i < count, is    output                 out_first + out_step * i
//   tap t, 0 <= t < taps, is          filter row or column   tap_first + tap_step * t
//   and there they meet               input                  in_first + in_step * i + in_tap_step * t
//
// with padding outside of [0, in). In fprop all outputs are one class: h = p * stride - pad + r * dil. dgrad has
// those where p = (h + pad - r * dil) / stride leaves no remainder. Outputs h that are equal modulo the stride, a
// residue class, meet the same taps: with g = gcd(stride, dil) every (stride / g)-th from some first one on, or none;
// and from one of them to the next, p falls by dil / g. So each class is a convolution of unit stride, and no product
// with a hole is formed.
#pragma once
#include "conv_problem.h"

namespace convext {

// An extent plus twice its padding must fit into 32 bits, which ConvProblem::p() asks for as well.
struct Axis {
  int32_t in, out;  // extents of what is read and of what is written
  int32_t count, out_first, out_step;
  int32_t taps, tap_first, tap_step;
  int32_t in_first, in_step, in_tap_step;

  CONVEXT_HD_INLINE static constexpr Axis fprop(int32_t in, int32_t out, int32_t taps, int32_t stride, int32_t pad,
                                                int32_t dil) {
    return {in, out, out, 0, 1, taps, 0, 1, -pad, stride, dil};
  }

  // Of the outputs residue, residue + stride, ...; `in` is the extent of dy, `out` that of dx.
  CONVEXT_HD_INLINE static constexpr Axis dgrad(int32_t in, int32_t out, int32_t filter, int32_t stride, int32_t pad,
                                                int32_t dil, int32_t residue) {
    int32_t gcd = stride, rest = dil;
    while (rest) {
      const int32_t next = gcd % rest;
      gcd = rest;
      rest = next;
    }
    const int32_t step = stride / gcd;
    int32_t first = 0;
    while (first < filter && first < step && (residue + pad - first * dil) % stride != 0) ++first;
    const bool none = first >= filter || first >= step;
    return {in,
            out,
            (out - residue + stride - 1) / stride,
            residue,
            stride,
            none ? 0 : (filter - first + step - 1) / step,
            none ? 0 : first,
            step,
            none ? 0 : (residue + pad - first * dil) / stride,
            1,
            -(dil / gcd)};
  }

  // The same taps in the order in which the inputs ascend, as dgrad's do not; a single one counts as stepping by one.
  CONVEXT_HD_INLINE constexpr Axis ascending() const {
    Axis a = *this;
    if (taps <= 1) a.in_tap_step = 1;
    if (a.in_tap_step > 0) return a;
    a.tap_first += (taps - 1) * tap_step, a.tap_step = -tap_step;
    a.in_first += (taps - 1) * in_tap_step, a.in_tap_step = -in_tap_step;
    return a;
  }

  CONVEXT_HD_INLINE constexpr int32_t output(int32_t i) const { return out_first + out_step * i; }
  CONVEXT_HD_INLINE constexpr int32_t tap(int32_t t) const { return tap_first + tap_step * t; }
  CONVEXT_HD_INLINE constexpr int32_t input(int32_t i, int32_t t) const {
    return in_first + in_step * i + in_tap_step * t;
  }
};

// An axis of a pass, and the classes that its outputs fall into.
struct AxisClasses {
  int32_t in, out, taps, stride, pad, dil;
  bool dgrad;

  CONVEXT_HD_INLINE constexpr int32_t count() const { return dgrad ? stride : 1; }
  CONVEXT_HD_INLINE constexpr Axis at(int32_t index) const {
    return dgrad ? Axis::dgrad(in, out, taps, stride, pad, dil, index) : Axis::fprop(in, out, taps, stride, pad, dil);
  }
};

// Of a forward pass that writes y, or of a dgrad, which writes dx.
CONVEXT_HD_INLINE constexpr AxisClasses depth_of(const ConvProblem& p, bool dgrad) {
  return {dgrad ? p.z() : p.d, dgrad ? p.d : p.z(), p.t, p.stride_d, p.pad_d, p.dil_d, dgrad};
}
CONVEXT_HD_INLINE constexpr AxisClasses height_of(const ConvProblem& p, bool dgrad) {
  return {dgrad ? p.p() : p.h, dgrad ? p.h : p.p(), p.r, p.stride_h, p.pad_h, p.dil_h, dgrad};
}
CONVEXT_HD_INLINE constexpr AxisClasses width_of(const ConvProblem& p, bool dgrad) {
  return {dgrad ? p.q() : p.w, dgrad ? p.w : p.q(), p.s, p.stride_w, p.pad_w, p.dil_w, dgrad};
}

}  // namespace convext
