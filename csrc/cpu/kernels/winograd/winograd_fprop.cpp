// Compiled for AVX512-BF16, too.
//
// fprop of 3x3 filters of stride 1, dilated or not, by Winograd's F(m x m, 3x3), m = 2, 3, 4 (winograd.h).
#include "winograd_passes.h"

CONVEXT_WINOGRAD_VARIANTS(fprop, Pass::kFprop, WinogradFprop)
