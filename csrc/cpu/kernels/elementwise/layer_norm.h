// Layer norm (Ba, Kiros and Hinton, 2016) over the channels of every pixel of an NHWC image:
//
//   y[i, c] = (x[i, c] - mean_i) / sqrt(var_i + eps) * gamma[c] + beta[c]
//
// with the mean and the biased variance of the pixel's own channels, each summed in a pass of its own, so that a mean
// far from zero costs the variance no accuracy. FLOP per byte of x and y: 10 / 8; it is fast where its input still is
// in the cache.
//
// It is a Variant although it is no convolution, so that it can be a step among them (block.h, sequence.h). Its
// problem is that of a 1x1 convolution from C to C channels; LaunchArgs::b points to eps, a double; gamma and beta are
// the epilogue's scale and shift, either of which may be absent. The epilogue has neither residual nor activation.
#pragma once
#include "core/isa_table.h"

namespace convext {

CONVEXT_ISA_TABLE(Variant, layer_norm_f32)
CONVEXT_ISA_TABLE(Variant, layer_norm_f64)

// The kernel for an instruction set that this CPU has, or nullptr where the dtype has none.
inline const Variant* layer_norm_for(Isa isa, DType dtype) {
  if (dtype == DType::kFloat32) return &layer_norm_f32_for(isa);
  return dtype == DType::kFloat64 ? &layer_norm_f64_for(isa) : nullptr;
}

}  // namespace convext
