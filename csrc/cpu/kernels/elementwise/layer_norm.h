// Layer norm (Ba, Kiros and Hinton, 2016) over the channels of every pixel of an NHWC image:
//
//   y[i, c] = (x[i, c] - mean_i) / sqrt(var_i + eps) * gamma[c] + beta[c]
//
// with the mean and the biased variance of the pixel's own channels, each summed in a pass of its own, so that a mean
// far from zero costs the variance no accuracy. FLOP per byte of x and y: 10 / 8; it is fast where its input still is in
// the cache.
//
// It is a Variant although it is no convolution, so that it can be a step among them (block.h, ops_sequence.cpp). Its
// problem is that of a 1x1 convolution from C to C channels; LaunchArgs::b points to eps, a double; gamma and beta are
// the epilogue's scale and shift, either of which may be absent. The epilogue has neither residual nor activation.
#pragma once
#include "core/variant.h"

namespace convext {

extern const Variant layer_norm_f32_portable, layer_norm_f64_portable;
#if defined(CONVEXT_HAVE_X86_ISAS)
extern const Variant layer_norm_f32_avx2, layer_norm_f64_avx2, layer_norm_f32_avx512, layer_norm_f64_avx512;
#endif

// The kernel for an instruction set that this CPU has, or nullptr where the dtype has none.
inline const Variant* layer_norm_for([[maybe_unused]] Isa isa, DType dtype) {
  if (dtype != DType::kFloat32 && dtype != DType::kFloat64) return nullptr;
  const bool f32 = dtype == DType::kFloat32;
#if defined(CONVEXT_HAVE_X86_ISAS)
  if (isa >= Isa::kAVX512) return f32 ? &layer_norm_f32_avx512 : &layer_norm_f64_avx512;
  if (isa == Isa::kAVX2) return f32 ? &layer_norm_f32_avx2 : &layer_norm_f64_avx2;
#endif
  return f32 ? &layer_norm_f32_portable : &layer_norm_f64_portable;
}

}  // namespace convext
