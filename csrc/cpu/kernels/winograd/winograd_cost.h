// What Winograd's kernels say about themselves, whatever the pass, and what they cost beside the others.
#pragma once
#include "cpu/kernels/family.h"

namespace convext::CONVEXT_ISA {

// Time of the transforms over the direct kernel's, times channels: measured.
constexpr double kTransforms = 2.5;
// FLOP that go by while a byte of weights comes from memory.
constexpr double kFlopsPerByte = 6;
// FLOP more an element of the weights than the direct form's packing, where they are new at every call.
constexpr double kTransformedWeight = 50;
// How much of the shorter of arithmetic and reading is not hidden behind the longer.
constexpr double kNotHidden = 0.25;

// Outputs along an axis over those of the tiles that cover it, of m outputs a dilation apart.
inline double tiled_share(int32_t out, int32_t dil, int32_t m) {
  if (out <= 0) return 1.0;
  const int32_t phases = out < dil ? out : dil, longest = (out + dil - 1) / dil;
  return static_cast<double>(out) / (static_cast<double>(phases) * ((longest + m - 1) / m) * m);
}

// F(m x m, 3 x 3) takes (m+2)^2 multiplications where the direct form needs 9 m^2; a fixed time for the transforms,
// which weighs less with more channels; and reading the transformed weights, which are (m+2)^2 / 9 times larger and
// come from memory: with few tiles that takes longer than the multiplications. dgrad runs in training, where the
// weights are new at every call and their transform counts; wgrad transforms its sums back instead.
inline double winograd_cost(const Variant& v, const ConvProblem& p) {
  const int32_t m = v.tile;
  const bool tiles_y = v.pass != Pass::kDgrad;
  const double positions = (m + 2.0) * (m + 2.0);
  const double used = tiled_share(tiles_y ? p.p() : p.h, p.dil_h, m) * tiled_share(tiles_y ? p.q() : p.w, p.dil_w, m);
  const double channels = static_cast<double>(p.c) * p.k / (static_cast<double>(p.c) + p.k);
  const double arithmetic = (positions / (9.0 * m * m) + kTransforms / channels) / used;
  const double weights = positions * p.c * p.k / p.flops();
  const double reading = (kFlopsPerByte * sizeof(float) + (v.pass == Pass::kFprop ? 0 : kTransformedWeight)) * weights;
  const double longer = arithmetic > reading ? arithmetic : reading;
  const double shorter = arithmetic > reading ? reading : arithmetic;
  return cost_of(v, p, longer + kNotHidden * shorter, kFloatCost);
}

// A kernel of F(m x m, 3 x 3). All arithmetic is that of floats, whatever the activations are.
constexpr Variant winograd_variant(Variant v, int32_t m) {
  v.tile = m;
  v.arithmetic = Arithmetic::float32;
  v.strictest = m == 2 ? Accuracy::kStrict : Accuracy::kFast;
  return v;
}

}  // namespace convext::CONVEXT_ISA
