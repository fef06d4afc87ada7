// The mean over the pixels of every image, NHWC to (N, 1, 1, C): the global average pooling in front of a classifier.
//
// Rows are summed one by one, and then their sums, so that rounding grows with the extents, not with the number of
// pixels. bfloat16 is summed in float, and rounded once. FLOP per byte: 1 / 4; it is read from where the last
// convolution has left it.
//
// It is a Variant although it is no convolution, so that it can be a step among them (sequence.h). Its problem is
// that of a depthwise convolution whose filter is as large as the image; there are no weights and no epilogue.
#pragma once
#include "core/isa_table.h"

namespace convext {

CONVEXT_ISA_TABLE(Variant, mean_f32)
CONVEXT_ISA_TABLE(Variant, mean_f64)
#if defined(CONVEXT_HAVE_X86_ISAS)
extern const Variant mean_bf16_avx512_bf16;
#endif

// The kernel for an instruction set that this CPU has, or nullptr where the dtype has none.
inline const Variant* mean_for(Isa isa, DType dtype) {
#if defined(CONVEXT_HAVE_X86_ISAS)
  if (dtype == DType::kBFloat16 && isa >= Isa::kAVX512BF16) return &mean_bf16_avx512_bf16;
#endif
  if (dtype == DType::kFloat32) return &mean_f32_for(isa);
  return dtype == DType::kFloat64 ? &mean_f64_for(isa) : nullptr;
}

}  // namespace convext
