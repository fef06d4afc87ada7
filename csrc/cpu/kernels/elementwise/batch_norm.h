// Batch norm with what surrounds it in a network, forward and backward, as one pass over memory where one is enough.
//
//   xhat = (y - mean) / sqrt(var + eps)      z = xhat * gamma + beta + residual      out = activation(z)
//
// mean and var absent: no normalisation, z = y * gamma + beta + residual. gamma, beta and residual may be absent too.
// One table of functions for each instruction set; batch_norm_for() picks.
#pragma once
#include "core/isa_table.h"

namespace convext {

// The operands that forward and backward share. Activations are dense (N, C, HW) in `layout`, stored in `dtype`;
// per-channel vectors are (C) in the compute dtype, float64 for float64 and float32 for the others.
//
// A mean of 1e4 is rounded in float32 by up to 5e-4, which all of (y - mean) inherits where the deviation is 1. y - mean
// itself is exact there, so `mean_rest` makes up for it at no cost: it goes into the channel's constants.
struct BatchNormArgs {
  int64_t n, c, hw;
  Layout layout;
  DType dtype;
  const void* y;
  const void* residual;  // or nullptr
  const void* mean;      // mean and var: both or neither
  const void* var;       // biased
  const void* gamma;     // or nullptr for 1
  const void* beta;      // or nullptr for 0
  double eps;
  Activation activation;
  const void* mean_rest = nullptr;  // what the exact mean has more than `mean`, or nullptr for 0
};

struct BatchNormGradients {
  const void* dout;
  void* dy;
  void* dgamma;     // (C) in the compute dtype, or nullptr
  void* dbeta;      // (C) in the compute dtype, or nullptr
  void* dresidual;  // or nullptr
  bool training;    // mean and var are functions of y, and the gradient flows through them too
};

// What bn_act_and_sums finds on the way, for bn_act_from_sums.
struct BatchNormSums {
  double* sums;  // [2][C]: sum dz, sum dz * (y - mean)
  void* dz;      // like y where `keeps_dz`, else not looked at
};

// Of each image and channel, (N, C) in the compute dtype.
struct BatchNormGates {
  const void* gates;
  const void* shifts;
};

struct BatchNorm {
  // Scratch bytes that each function below wants, 64-byte aligned, not cleared.
  int64_t (*workspace)(const BatchNormArgs&);

  // Mean and biased variance of y over N and HW, (C), in double and in the compute dtype. Reads n, c, hw, layout, dtype
  // and y alone.
  void (*batch_stats)(const Parallel&, const BatchNormArgs&, double* mean, void* var, void* workspace);

  void (*bn_act)(const Parallel&, const BatchNormArgs&, void* out, void* workspace);

  // dz = dout * activation'(z), dresidual = dz, dbeta = sum dz, dgamma = sum dz * xhat (sum dz * y without mean), and
  //   dy = gamma / sqrt(var + eps) * (dz - dbeta / M - xhat * dgamma / M)   in training, M = N * HW
  //   dy = gamma / sqrt(var + eps) * dz                                      otherwise
  void (*bn_act_backward)(const Parallel&, const BatchNormArgs&, const BatchNormGradients&, void* workspace);

  // bn_act_backward in training without a residual, in two calls. The first computes `out` as bn_act does in the same
  // pass as the sums, for who needs it at that time. The second takes the gradients' dout and dy; where dout is nullptr,
  // dy is the first's dz, which it overwrites. Together they give bit for bit the same.
  bool (*keeps_dz)(const BatchNormArgs&);
  void (*bn_act_and_sums)(const Parallel&, const BatchNormArgs&, const void* dout, void* out, const BatchNormSums&,
                          void* workspace);
  void (*bn_act_from_sums)(const Parallel&, const BatchNormArgs&, const BatchNormGradients&, const double* sums,
                           void* workspace);

  // ---- The same passes in NHWC a piece at a time, for who runs them between the steps of a convolution, on memory that
  // is in the cache. Nothing is in parallel. Where a function takes y or dout itself, the pointer is to the first of
  // `pixels`; the others read args.y. A call of `load`, or of `load_gradient`, comes before all of them but the
  // statistics' and leaves the channels' constants in the workspace, which all of a tensor's pieces share.

  // Sums are of chunks, whole images or parts of one, whose pixels are [chunk_begin(i), chunk_begin(i + 1)).
  int64_t (*chunks)(const BatchNormArgs&);
  int64_t (*chunk_begin)(const BatchNormArgs&, int64_t chunk);

  void (*load)(const BatchNormArgs&, void* workspace);
  // From the sums [2][C]: the gradients' dgamma and dbeta, and what `gradient` needs.
  void (*load_gradient)(const BatchNormArgs&, const BatchNormGradients&, const double* sums, void* workspace);
  void (*act)(const BatchNormArgs&, const void* y, int64_t pixels, void* out, const void* workspace);
  // dy of bn_act_backward in training.
  void (*gradient)(const BatchNormArgs&, const void* y, const void* dout, int64_t pixels, void* dy,
                   const void* workspace);

  // What batch_stats is made of.
  void (*stats_of_chunk)(const BatchNormArgs&, int64_t chunk, void* workspace);
  void (*finish_stats)(const Parallel&, const BatchNormArgs&, double* mean, void* var, void* workspace);

  // What the sums of bn_act_and_sums are made of. dout is all of it; `out`, or nullptr, is of the chunk's first pixel.
  void (*sums_of_chunk)(const BatchNormArgs&, const void* dout, int64_t chunk, void* out, void* workspace);
  void (*finish_sums)(const Parallel&, const BatchNormArgs&, double* sums, void* workspace);

  // ---- Squeeze and excitation behind it, in NHWC and without a residual: a = activation(z) times a gate for each image
  // and channel, which follows from the means of a.

  // out (N, C) = factor * the sum over an image's pixels of a, or where dout is not nullptr of a * dout.
  void (*image_sums)(const Parallel&, const BatchNormArgs&, const void* dout, double factor, void* out,
                     void* workspace);
  // out = a * gates (N, C).
  void (*gated)(const Parallel&, const BatchNormArgs&, const void* gates, void* out, void* workspace);
  // da = dout * gates + shifts, and in the same pass the sums of bn_act_and_sums over da.
  void (*gated_backward)(const Parallel&, const BatchNormArgs&, const void* dout, const BatchNormGates&, void* da,
                         double* sums, void* workspace);
};

CONVEXT_ISA_TABLE(BatchNorm, batch_norm)

}  // namespace convext
