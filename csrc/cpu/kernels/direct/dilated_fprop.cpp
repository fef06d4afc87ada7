// Compiled for AVX512-BF16, too.
//
// fprop with a dilated filter: the direct product with tiles that stay within one row of the output, so that a tap that
// lies above, below or beside the image for the whole tile is skipped. With a dilation near the size of the image most
// taps are; tiles that straddle rows would keep many of them for the sake of a few pixels.
#include "cpu/kernels/gemm/gemm_passes.h"
#include "direct.h"

CONVEXT_DEFINE_VARIANTS(fprop_dilated,
                        of_volumes(packed_variant<T, GemmFprop<T, true>>(name, Algorithm::dilated, Pass::kFprop,
                                                                         reject_undilated, dilated_work)))
