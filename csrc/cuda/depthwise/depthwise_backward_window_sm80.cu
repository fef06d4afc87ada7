// Depthwise convolution, backward, channels-last: both gradients in one pass over x and dy, 3 tensors of traffic where
// two kernels need 4 (depthwise_backward.h).
//
//   dx[n,h,w,c] = sum_{r,s} dy[n,p,q,c] * w[c,r,s]        dw[c,r,s] = sum_{n,h,w} dy[n,p,q,c] * x[n,h,w,c]
//
// 36 FLOP for 6 bytes at 3x3 in bf16: memory decides; from 5x5 up the FMA units do.
//
// The kernel and its tile are in depthwise_patch.h. Neighbouring threads have neighbouring runs of channels, 128
// bytes in a row; a run is 16 bytes at 3x3 and less where dw would not fit:
//   registers of dw   R*R*VEC: 72 of 255 at 3x3 with 8 channels (bf16), 36 with 4 (fp32), 100 at 5x5 with 4, 98 at 7x7
//                     with 2; beside them 4*VEC sums of dx and a row of windows, (4 + R - 1)*VEC/2 words of bf16
//   shared memory     the filters of the block's channels, R*R*lanes*VEC*4 B = 2.3 KiB at 3x3, and the warps' shares of
//                     a tap, 8*lanes*VEC*4 B = 2 KiB
#include "depthwise_patch.h"

namespace convext {
CONVEXT_DEPTHWISE(cuda::bf16, bf16, window, cuda::Patched<cuda::bf16, cuda::Form::kNHWC>)
CONVEXT_DEPTHWISE(cuda::fp16, f16, window, cuda::Patched<cuda::fp16, cuda::Form::kNHWC>)
CONVEXT_DEPTHWISE(float, f32, window, cuda::Patched<float, cuda::Form::kNHWC>)
}  // namespace convext
