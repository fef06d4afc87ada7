// Depthwise convolution, backward, NCHW as it is: both gradients in one pass over x and dy, 3 tensors of traffic where
// two kernels need 4 (depthwise_backward.h).
//
//   dx[n,h,w,c] = sum_{r,s} dy[n,p,q,c] * w[c,r,s]        dw[c,r,s] = sum_{n,h,w} dy[n,p,q,c] * x[n,h,w,c]
//
// 36 FLOP for 6 bytes at 3x3 in bf16: memory decides.
//
// The kernel and its tile are in depthwise_patch.h. VEC = 1: neighbouring threads along a row, a load is 4 pixels
// apart and 64 bytes or more a warp; small planes side by side in a tile, at least 32 threads each, so that a warp has
// one plane and adds dw by shuffles alone.
//   registers of dw   R*R: 9, 25 or 49; beside them 4 sums of dx and a window of 4 + R - 1 columns, 132 at most in all
//   shared memory     the filters of the planes, R*R*8*4 B = 288 B at 3x3, and the warps' shares of a tap, 256 B
#include "depthwise_patch.h"

namespace convext {
CONVEXT_DEPTHWISE(cuda::bf16, bf16, planes, cuda::Patched<cuda::bf16, cuda::Form::kNCHW>)
CONVEXT_DEPTHWISE(cuda::fp16, f16, planes, cuda::Patched<cuda::fp16, cuda::Form::kNCHW>)
CONVEXT_DEPTHWISE(float, f32, planes, cuda::Patched<float, cuda::Form::kNCHW>)
}  // namespace convext
