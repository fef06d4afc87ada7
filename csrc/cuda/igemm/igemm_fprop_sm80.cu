// Direct convolution, forward, on the tensor cores: y[n,p,q,k] = sum_{r,s,c} x[n,h,w,c] * w[k,r,s,c], then the
// epilogue.
//
//   A (NPQ, RSC) = im2col of x, built chunk by chunk while loading; B (RSC, K) = w in KRSC order; C (NPQ, K) = y
//   grid: x = (tile of pixels, tile of filters), filters innermost: neighbours in time share the pixels in L2; y =
//   group
//
// The main loop, the tile map and the skipped taps are in igemm_pixels.h. Budget, by tile (igemm_tiles.h): 24
// to 96 KiB of shared memory, 16 to 128 registers of accumulators.
// Batch statistics, where wanted, come from the epilogue's registers; merging them reuses the stages' memory, at
// most 16*(2*128 + 1)*4 B = 16 KiB, and writes a row of partials a tile of pixels: 8 B for 64 or more elements of y.
// Bytes: x and y once through memory, w once a row of tiles through L2. At 128x128 a block computes 64 FLOP for each
// byte that it loads. Chosen by their cost (igemm_tiles.h).
// `gather` is the same kernel with a loader that collects elements one by one: channels that are not whole 16-byte
// chunks, NHWC or NCHW, their reduction R*S*C padded once rather than at every tap. A first layer is cuda/stem's.
#include "igemm_pixels.h"
#include "igemm_tiles.h"

namespace convext {

#define CONVEXT_IGEMM(T, dtype, k, form, tile, suffix, vector)                                                      \
  extern const Variant fprop_igemm_##dtype##_##tile##x##k##suffix##_sm80 =                                          \
      cuda::igemm_pixels_variant<cuda::form##tile<T>, false, vector>("fprop_igemm_" #dtype "_" #tile "x" #k #suffix \
                                                                     "_sm80");
CONVEXT_IGEMM_DTYPES(CONVEXT_IGEMM_TILES)
CONVEXT_IGEMM(cuda::bf16, bf16, 64, Tile, 256x128, , true)
CONVEXT_IGEMM(cuda::fp16, f16, 64, Tile, 256x128, , true)
CONVEXT_IGEMM(float, tf32, 32, Tile, 256x128, , true)

}  // namespace convext
