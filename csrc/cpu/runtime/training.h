// A convolution between two batch norms in training, a piece of the pixels at a time, so that what each pass leaves for
// the next is still in the cache:
//
//   forward    x = activation(batch_norm(y before))  ->  y = x * w   ->  sums for y's statistics
//   backward   dy = batch norm's gradient  ->  dx = dgrad(dy)  ->  x again, sums for the layer before  ->  dw += dy x
//
// Of memory the forward reads y before and writes y; the backward reads dout, y and y before and writes dx. x and dy are
// never tensors.
//
//   y before, y   (pixels, C), (pixels, K) in memory      [ chunk | chunk | chunk | chunk ...
//   piece         some chunks: pixels of a 1x1 layer,     [     piece     |     piece     ...
//                 whole images of any other
//   share         pieces that one sum of dw is over       [             share             ...
//
// y and, of the same dy, dx are bit for bit those of the passes one by one, for how a kernel sums an output does not
// depend on which others it computes; statistics and sums over dx too, because they are of the same chunks. dw is summed
// in another order, which depends on the problem alone, as all of it does, and not on the threads.
#pragma once
#include "core/variant.h"
#include "cpu/kernels/elementwise/batch_norm.h"
#include "cpu/kernels/gemm/wgrad_sum.h"

namespace convext {

// y, and its batch statistics.
struct FpropStats {
  const Variant* variant;
  ConvProblem problem;         // float32 or float64; y in NHWC, x as the variant takes it, in NHWC with `input`
  LaunchArgs args;             // of the whole batch; a: x, or with `input` not looked at
  const BatchNormArgs* input;  // x is this batch norm and its activation, or nullptr
  BatchNormArgs output;        // of y: n, c, hw, layout, dtype and y alone are read
  double* mean;
  void* var;  // (K) in the dtype
};

int64_t fprop_stats_workspace(const FpropStats&, const BatchNorm&, int32_t threads);
// Returns nullptr, or what went wrong in words.
const char* fprop_stats(FpropStats, const BatchNorm&, void* workspace, const Parallel&);

// All gradients of activation(batch_norm(x * w)), by the batch's statistics.
struct BatchNormConvGradients {
  const Variant *dgrad, *wgrad;
  ConvProblem problem;  // float32 or float64, all in NHWC
  const void* weights;  // as dgrad takes them
  WeightSource source;  // and as they were before
  const void* dout;
  BatchNormArgs output;  // of this layer, whose y it has
  const double* sums;    // [2][K] of bn_act_and_sums over dout, or nullptr
  void *dgamma, *dbeta;  // (K) in the dtype
  const void* x;         // or nullptr with `input`
  const BatchNormArgs* input;
  double* input_sums;  // with `input`: [2][C] of its bn_act_and_sums over dx, or nullptr
  void *dx, *dw;       // dw: KCRS
};

int64_t batch_norm_conv_gradients_workspace(const BatchNormConvGradients&, const BatchNorm&, const WgradSum&,
                                            int32_t threads);
// Returns nullptr, or what went wrong in words.
const char* batch_norm_conv_gradients(BatchNormConvGradients, const BatchNorm&, const WgradSum&, void* workspace,
                                      const Parallel&);

}  // namespace convext
