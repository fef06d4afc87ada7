// A chain of elementwise operations (core/chain.h) over a float32 tensor, in one pass: a part of the first cache's size
// at a time goes through all of them.
//
//   z = x;   for every step:   z[o, c, i] = apply(z[o, c, i], operand[c], or what was kept, or the step's value)
//
// `keep` keeps z as it is then, for one later step or more to take as their operand: z * sigmoid(z). z may be x itself.
// The tensor is seen as (outer, channels, inner): an NCHW one with the pixels as inner, an NHWC one with the pixels as
// outer and inner 1. Bytes a call moves: 8 an element, however many steps.
//
// Its gradients take one pass as well: from x, which goes through all steps again, or, where every derivative follows
// from it or is constant, from the result. 12 bytes an element.
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

// saved   x, or with `by_output` the result: read by relu, leaky_relu, sigmoid, tanh and hardtanh's bounds in the place of
//         whatever they saw, so that one of these alone (or a pair of bounds) may be there, behind constant derivatives
// dx      may be neither of the two above
// sums    for each step nullptr, or where the gradient of its operand goes, one sum for each channel
struct ChainGradients {
  const float* dout;
  const float* saved;
  bool by_output;
  float* dx;
  double* sums[kChainSteps];
};

struct Chain {
  void (*run)(const Parallel&, const float* x, float* z, int64_t outer, int64_t channels, int64_t inner,
              const ChainStep* steps, int count);
  int64_t (*workspace)(const ChainGradients&, int64_t outer, int64_t channels, int64_t inner, int count);  // bytes
  void (*backward)(const Parallel&, const ChainGradients&, int64_t outer, int64_t channels, int64_t inner,
                   const ChainStep* steps, int count, void* workspace);
};

CONVEXT_ISA_TABLE(Chain, chain)

}  // namespace convext
