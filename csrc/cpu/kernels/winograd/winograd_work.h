// What Winograd's kernels say about themselves, whatever the pass.
#pragma once
#include "cpu/kernels/family.h"

namespace convext::CONVEXT_ISA {

// Tiles along an axis, of m outputs a dilation apart.
inline double tiles_along(int32_t out, int32_t dil, int32_t m) {
  if (out <= 0) return 0;
  const int32_t phases = out < dil ? out : dil, longest = (out + dil - 1) / dil;
  return static_cast<double>(phases) * ((longest + m - 1) / m);
}

// F(m x m, 3 x 3) takes (m+2)^2 multiplications a tile, channel and filter; transforms of each tile's inputs and
// outputs, for each vector of channels; and the transformed weights, (m+2)^2 of them a filter and channel, which come
// from memory, and in dgrad, which runs in training, are transformed at every call. wgrad transforms its sums back.
inline void winograd_work(const Variant& v, const ConvProblem& p, Work& work) {
  const bool dgrad = v.pass == Pass::kDgrad;
  const double positions = (v.tile + 2.0) * (v.tile + 2.0);
  const double tiles =
      p.n * tiles_along(dgrad ? p.h : p.p(), p.dil_h, v.tile) * tiles_along(dgrad ? p.w : p.q(), p.dil_w, v.tile);
  const double in = vectors_of(dgrad ? p.k : p.c, v), out = vectors_of(dgrad ? p.c : p.k, v);
  const double products = v.pass == Pass::kFprop ? p.c * vectors_of(p.k, v) : p.k * vectors_of(p.c, v);
  work[Term::product] += positions * tiles * products;
  work[Term::gather] += positions * tiles * in;
  work[Term::scatter] += positions * tiles * out;
  work[Term::weight] += positions * p.c * p.k;
}

// A kernel of F(m x m, 3 x 3). All arithmetic is that of floats, whatever the activations are.
constexpr Variant winograd_variant(Variant v, int32_t m) {
  v.tile = m;
  v.arithmetic = Arithmetic::float32;
  v.strictest = m == 2 ? Accuracy::kStrict : Accuracy::kFast;
  return v;
}

}  // namespace convext::CONVEXT_ISA
