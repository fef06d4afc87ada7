// Compiled for AVX512-BF16, too.
//
// fprop of 3x3 filters of stride 1, dilated or not, by Winograd's F(m x m, 3x3), m = 2, 3, 4 (winograd.h).
#include "winograd_passes.h"

CONVEXT_FOR_WINOGRAD(CONVEXT_DEFINE_VARIANT_OF, fprop_winograd2x2, WinogradPass<T, 2, Pass::kFprop>::variant(name))
CONVEXT_FOR_WINOGRAD(CONVEXT_DEFINE_VARIANT_OF, fprop_winograd3x3, WinogradPass<T, 3, Pass::kFprop>::variant(name))
CONVEXT_FOR_WINOGRAD(CONVEXT_DEFINE_VARIANT_OF, fprop_winograd4x4, WinogradPass<T, 4, Pass::kFprop>::variant(name))
