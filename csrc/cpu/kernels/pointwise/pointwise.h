// 1x1 convolutions of few channels at unit stride: a product of a tall matrix, the pixels, with a small one, the
// weights.
//
//   out[m, n] = epilogue(sum_l in[m, l] * w[l, n])        m over all pixels; NHWC on both sides
//
// An output is a sum of at most kPointwiseDepth products, so what a tile costs besides its multiplications decides: its
// rows are a constant distance apart and need no table of pointers (strided_tile.h). A block of pixels stays in the
// first-level cache while all columns pass over it; the weights fit there beside it.
#pragma once
#include "cpu/kernels/gemm/gemm_passes.h"

namespace convext::CONVEXT_ISA {

constexpr int32_t kPointwiseDepth = 64;

// `depth` channels in, `columns` out; the packed order is pack_panels'.
struct PointwiseGemm {
  const float* in;
  const float* packed;
  float* out;
  int64_t pixels;
  int32_t depth, columns;
  Epilogue epilogue;
};

void run_pointwise(const PointwiseGemm&, const Parallel&);

inline void pointwise_work(const Variant& v, const ConvProblem& p, Work& work) {
  const bool dgrad = v.pass == Pass::kDgrad;
  const double vectors = vectors_of(dgrad ? p.c : p.k, v), pixels = static_cast<double>(p.npq());
  work[Term::product] += pixels * (dgrad ? p.k : p.c) * vectors;
  work[Term::output] += pixels * vectors;
  work[Term::operand] += static_cast<double>(dgrad ? p.y_size() : p.x_size());
  work[Term::weight] += static_cast<double>(p.w_size());
}

inline const char* reject_unless_short_pointwise(const ConvProblem& p, int32_t depth) {
  if (!p.is_pointwise()) return "the filter is not 1x1";
  if (p.groups != 1) return "the channels are in groups";
  if (!p.is_unit_stride() || p.pad_h != 0 || p.pad_w != 0) return "the stride is not 1, or there is padding";
  return depth <= kPointwiseDepth ? nullptr : "it sums over more than 64 channels";
}

}  // namespace convext::CONVEXT_ISA
