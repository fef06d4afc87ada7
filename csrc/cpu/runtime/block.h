// A block: pointwise and depthwise convolutions in a row, each read by the next alone, as an inverted residual is made
// of them. They run as one, a strip of rows at a time, so that what lies between two of them never leaves the cache and
// is no tensor at all.
//
//   x  --1x1-->  [ rows of an expanded image ]  --3x3 depthwise-->  [ rows ]  --1x1-->  y
//                  held in a buffer of the thread, the rows that two strips share kept
//
// Every step is an ordinary fprop variant, called on the rows that the strip needs. Where squeeze and excitation
// stands between two steps, the image in front of it is computed to its end first, into a buffer of its own.
//
// The values are those of the steps one by one, bit for bit: how a variant sums an output does not depend on which
// other outputs a call computes. For the same reason they do not depend on the number of threads.
#pragma once
#include <vector>

#include "core/api.h"
#include "core/variant.h"
#include "cpu/kernels/elementwise/squeeze_excite.h"

namespace convext {

struct BlockStep {
  const Variant* variant;  // an fprop over NHWC
  ConvProblem problem;     // of the whole batch
  const void* weights;     // as the variant takes them
  WeightSource source;     // and as they were before
  Epilogue epilogue;       // its residual is of the whole batch
  bool excites;            // scale the input by `excite`'s gates first
  Excite excite;
};

// Why the steps cannot run as a block, in words, or nullptr: what the strips rely on.
CONVEXT_API const char* reject_block(const std::vector<BlockStep>& steps);

// What a strip may take of the cache, in bytes: half of the second level, whose other half is for weights and for what
// the kernels stream past.
int64_t block_cache_budget();

// Bytes of workspace for run_block, 64-byte aligned, not cleared.
int64_t block_workspace(const std::vector<BlockStep>& steps, int32_t threads, int64_t budget = block_cache_budget());

// out = the last step's output. Returns nullptr, or what went wrong in words.
const char* run_block(const std::vector<BlockStep>& steps, const void* in, void* out, void* workspace,
                      const SqueezeExcite& squeeze_excite, const Parallel& parallel,
                      int64_t budget = block_cache_budget());

}  // namespace convext
