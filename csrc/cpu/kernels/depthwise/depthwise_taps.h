// What the forward pass and the input gradient of a depthwise convolution share: a sum over filter taps for every
// output pixel, all channels of the filter bank side by side in memory,
//
//   out[n, i, j, k] = sum_{a, b} in[n, i', j', k / m] * w[k, a, b]
//
// Each axis is split into classes of outputs that meet the same taps: one class in fprop, stride classes in dgrad,
// where only every stride-th tap lands on a dy pixel. Within a class everything is affine in the output's and the
// tap's index, so one kernel serves both passes and no product with an inserted zero is computed.
#pragma once
#include "cpu/simd/half.h"

namespace convext::CONVEXT_ISA {

// One class of outputs along one axis: output `first + i * step`, i < count, meets tap t < taps at input
// `in_first + i * in_step + t * tap_step` (outside [0, in_size): padding), with weight `w_first + t * w_step`.
struct TapAxis {
  int32_t count, first, step;
  int32_t in_first, in_step, in_size;
  int32_t taps, tap_step, w_first, w_step;
};

// An axis of the problem, and its classes.
struct TapClasses {
  int32_t out_size, in_size, taps, stride, pad, dil;
  bool transposed;  // dgrad: out is dx

  int32_t count() const { return transposed ? stride : 1; }
  TapAxis at(int32_t index) const;
};

template <class T>
struct TapSum {
  TapClasses h, w;
  int32_t n, k, multiplier;  // k channels of the filter bank; fprop reads channel k / multiplier of its input
  const T* in;
  const compute_t<T>* packed;
  T* out;
  Epilogue epilogue;
};

// Filters packed [block][r][s][W] in the compute type: W lanes are neighbours k. The last block starts at k - W where
// k >= W, overlapping the one before it, so that no load needs a mask; a smaller k is padded with zeros.
constexpr int64_t tap_blocks(int64_t k, int64_t width) { return (k + width - 1) / width; }
constexpr int64_t tap_block_begin(int64_t block, int64_t k, int64_t width) {
  return k < width ? 0 : block * width < k - width ? block * width : k - width;
}

template <class T>
int64_t packed_taps_size(const ConvProblem& problem) {
  constexpr int64_t width = VecOf<T>::width;
  return tap_blocks(problem.k, width) * width * problem.r * problem.s * int64_t{sizeof(compute_t<T>)};
}

template <class T>
void pack_taps(const ConvProblem& problem, const void* w, void* packed, const Parallel& parallel);

// out = epilogue(sum over taps) for every output of every class; for a multiplier above 1 the input is spread on load.
template <class T>
void sum_taps(const TapSum<T>& sum, const Parallel& parallel);

// dgrad with a multiplier above 1: out[n, i, j, c] = sum of the `multiplier` filters of channel c.
template <class T>
void sum_taps_and_filters(const TapSum<T>& sum, const Parallel& parallel);

}  // namespace convext::CONVEXT_ISA
