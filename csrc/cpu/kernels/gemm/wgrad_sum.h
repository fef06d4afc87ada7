// The weight gradient as a sum over pieces of the pixels, for who has dy and x a piece at a time: gemm_wgrad.h's product,
// whose sums stay between two pieces. One table of functions for each instruction set; wgrad_sum_for() picks. float32
// and float64 in NHWC.
#pragma once
#include "core/isa_table.h"

namespace convext {

// Problems are of a piece: their n, h and w say how many pixels it has.
struct WgradSum {
  // Of the sums of any pixels, 64-byte aligned.
  int64_t (*bytes)(const ConvProblem&);

  // sums = those of a piece, or those that are there and those of a piece if `adds`.
  void (*add)(const ConvProblem&, const Parallel&, const void* dy, const void* x, void* sums, bool adds);

  // dw, KCRS, from `shares` sums one behind the other, in their order.
  void (*finish)(const ConvProblem&, const Parallel&, const void* sums, int64_t shares, void* dw);
};

CONVEXT_ISA_TABLE(WgradSum, wgrad_sum)

}  // namespace convext
