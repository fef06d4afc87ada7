// A chain of elementwise operations (core/chain.h) over a float32 tensor, in place and in one pass: a part of the first
// cache's size at a time goes through all of them.
//
//   for every step:   z[o, c, i] = apply(z[o, c, i], operand[c], or what was kept, or the step's value)
//
// `keep` keeps z as it is then, for one later step or more to take as their operand: z * sigmoid(z).
// The tensor is seen as (outer, channels, inner): an NCHW one with the pixels as inner, an NHWC one with the pixels as
// outer and inner 1. Bytes a call moves: 8 an element, however many steps.
#pragma once
#include "core/chain.h"
#include "core/isa_table.h"

namespace convext {

constexpr int kChainSteps = 8;  // at most

struct ChainStep {
  ChainOperation operation;
  const float* operand;  // a value for each channel, or nullptr
  float value;           // for all channels
  bool takes_kept;       // the operand is what was kept
};

struct Chain {
  void (*run)(const Parallel&, float* z, int64_t outer, int64_t channels, int64_t inner, const ChainStep* steps,
              int count);
};

CONVEXT_ISA_TABLE(Chain, chain)

}  // namespace convext
