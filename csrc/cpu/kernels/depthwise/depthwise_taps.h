// What the forward pass and the input gradient of a depthwise convolution share: a sum over filter taps for every
// output pixel, all channels of the filter bank side by side in memory,
//
//   out[n, l, i, j, k] = sum_{t, a, b} in[n, l', i', j', k / m] * w[k, t, a, b]
//
// Within a class of outputs (core/axis.h) everything is affine in the output's and the tap's index, so one kernel
// serves both passes and no product with an inserted zero is computed. Taps are walked so that what they read ascends.
#pragma once
#include "core/axis.h"
#include "cpu/simd/half.h"

namespace convext::CONVEXT_ISA {

template <class T>
struct TapSum {
  AxisClasses d, h, w;
  int32_t n, k, multiplier;  // k channels of the filter bank; fprop reads channel k / multiplier of its input
  const T* in;
  const compute_t<T>* packed;
  T* out;
  Epilogue epilogue;
};

// Filters packed [block][t][r][s][W] in the compute type: W lanes are neighbours k. The last block starts at k - W where
// k >= W, overlapping the one before it, so that no load needs a mask; a smaller k is padded with zeros.
constexpr int64_t tap_blocks(int64_t k, int64_t width) { return (k + width - 1) / width; }
constexpr int64_t tap_block_begin(int64_t block, int64_t k, int64_t width) {
  return k < width ? 0 : block * width < k - width ? block * width : k - width;
}

template <class T>
int64_t packed_taps_size(const ConvProblem& problem) {
  constexpr int64_t width = VecOf<T>::width;
  return tap_blocks(problem.k, width) * width * problem.taps() * int64_t{sizeof(compute_t<T>)};
}

template <class T>
void pack_taps(const ConvProblem& problem, const void* w, void* packed, const Parallel& parallel);

// out = epilogue(sum over taps) for every output of every class; for a multiplier above 1 the input is spread on load.
template <class T>
void sum_taps(const TapSum<T>& sum, const Parallel& parallel);

// dgrad with a multiplier above 1: out[n, l, i, j, c] = epilogue(sum of the `multiplier` filters of channel c).
template <class T>
void sum_taps_and_filters(const TapSum<T>& sum, const Parallel& parallel);

}  // namespace convext::CONVEXT_ISA
