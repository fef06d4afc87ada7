// The batch-norm passes on CUDA: batch_norm_sm80.cu. All pointers are device addresses; per-channel arrays are in the
// accumulate dtype, float64 for float64 and float32 for the others. Each launch returns nullptr or what went wrong.
#pragma once
#include "core/api.h"
#include "core/variant.h"

namespace convext::cuda {

// A dense activation tensor.
struct NormShape {
  int64_t n, c, h, w;
  DType dtype;
  Layout layout;
};

// z = (y - mean) / sqrt(var + eps) * gamma + beta; a null array stands for 0, 1, 1, 0.
struct NormParameters {
  const void *mean, *var, *gamma, *beta;
  double eps;
};

// Why the kernels below cannot take the shape, in words, or nullptr.
CONVEXT_API const char* reject_norm(const NormShape& shape);

// Bytes of scratch memory for launch_batch_stats and launch_bn_act_backward.
CONVEXT_API int64_t norm_workspace(const NormShape& shape);

// Bytes of `rows` rows of partial statistics, as an fprop kernel writes them (LaunchArgs::stats).
constexpr int64_t partial_stats_bytes(int64_t rows, int64_t channels, DType accumulate) {
  return rows * (2 * channels + 1) * dtype_size(accumulate);
}

// Mean and biased variance of each channel, out of such rows.
CONVEXT_API const char* launch_merge_stats(int64_t channels, int64_t rows, DType accumulate, const void* partial,
                                           void* mean, void* var, void* stream);

// Mean and biased variance of each channel.
CONVEXT_API const char* launch_batch_stats(const NormShape& shape, const void* y, void* mean, void* var,
                                           void* workspace, void* stream);

// out = activation(z + residual); residual may be null.
CONVEXT_API const char* launch_bn_act(const NormShape& shape, const NormParameters& parameters, Activation activation,
                                      const void* y, const void* residual, void* out, void* stream);

// Gradients of launch_bn_act. `training`: mean and var were those of y, and the gradient flows through them.
CONVEXT_API const char* launch_bn_act_backward(const NormShape& shape, const NormParameters& parameters,
                                               Activation activation, bool training, const void* dout, const void* y,
                                               const void* residual, void* dy, void* dgamma, void* dbeta,
                                               void* dresidual, void* workspace, void* stream);

// The epilogue that a bias and a batch norm in inference amount to: scale and shift, channel by channel.
CONVEXT_API const char* launch_fold(int64_t channels, DType accumulate, const NormParameters& parameters,
                                    const void* bias, void* scale, void* shift, void* stream);

}  // namespace convext::cuda
