// Compiled for AVX512-BF16, too.
//
// dgrad with a dilated filter: the direct product with tiles that stay within one row of dx, so that a tap that
// lies above, below or beside dy for the whole tile is skipped. With a dilation near the size of dy most
// taps are; tiles that straddle rows would keep many of them for the sake of a few pixels.
#include "cpu/kernels/gemm/gemm_passes.h"
#include "direct.h"

CONVEXT_DEFINE_VARIANTS(dgrad_dilated,
                        of_volumes(packed_variant<T, GemmDgrad<T, true>>(name, Algorithm::dilated, Pass::kDgrad,
                                                                         reject_undilated, dilated_work)))
