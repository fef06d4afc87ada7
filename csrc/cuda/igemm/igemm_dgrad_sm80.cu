// Direct convolution, gradient of the input, on the tensor cores: dx[n,h,w,c] = sum_{r,s,k} dy[n,p,q,k] * w[k,r,s,c].
// It is also the forward pass of a transposed convolution.
//
//   A (NHW, RSK) = dy gathered around each input pixel; B (RSK, C) = w in KRSC order, N-major; C (NHW, C) = dx
//   grid: x = (tile of pixels, tile of channels); y = group; z = residue class of the pixels modulo the stride
//
// A stride costs nothing: each class is a dense convolution with the taps that reach it (igemm_pixels.h), where a
// convolution with a dilated dy would multiply stride_h*stride_w - 1 zeros for every product. Budget, by tile
// (igemm_tiles.h): 24 to 96 KiB of shared memory, 16 to 128 registers of accumulators; FLOP for each byte as in
// fprop. `gather` collects elements one by one, for channels that are not whole 16-byte chunks, and NCHW.
#include "igemm_pixels.h"
#include "igemm_tiles.h"

namespace convext {

#define CONVEXT_IGEMM(T, dtype, k, form, tile, suffix, vector)                                                     \
  extern const Variant dgrad_igemm_##dtype##_##tile##x##k##suffix##_sm80 =                                         \
      cuda::igemm_pixels_variant<cuda::form##tile<T>, true, vector>("dgrad_igemm_" #dtype "_" #tile "x" #k #suffix \
                                                                    "_sm80");
CONVEXT_IGEMM_DTYPES(CONVEXT_IGEMM_TILES)
// Not for tf32: its N-major fragments are loaded word by word, and the addresses do not fit beside 128 accumulators.
CONVEXT_IGEMM(cuda::bf16, bf16, 64, Tile, 256x128, , true)
CONVEXT_IGEMM(cuda::fp16, f16, 64, Tile, 256x128, , true)

}  // namespace convext
