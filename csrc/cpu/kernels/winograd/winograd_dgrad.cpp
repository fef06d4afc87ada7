// Compiled for AVX512-BF16, too.
//
// dgrad of 3x3 filters of stride 1, dilated or not: the same filtering as fprop's with the weights transposed and
// rotated (winograd.h). In training they change at every step, so their transform counts.
#include "winograd_passes.h"

CONVEXT_WINOGRAD_VARIANTS(dgrad, Pass::kDgrad, WinogradDgrad)
