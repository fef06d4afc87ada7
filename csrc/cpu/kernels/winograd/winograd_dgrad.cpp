// Compiled for AVX512-BF16, too.
//
// dgrad of 3x3 filters of stride 1, dilated or not: the same filtering as fprop's with the weights transposed and
// rotated (winograd.h). In training they change at every step, so their transform counts.
#include "winograd_passes.h"

CONVEXT_FOR_WINOGRAD(CONVEXT_DEFINE_VARIANT_OF, dgrad_winograd2x2, WinogradPass<T, 2, Pass::kDgrad>::variant(name))
CONVEXT_FOR_WINOGRAD(CONVEXT_DEFINE_VARIANT_OF, dgrad_winograd3x3, WinogradPass<T, 3, Pass::kDgrad>::variant(name))
CONVEXT_FOR_WINOGRAD(CONVEXT_DEFINE_VARIANT_OF, dgrad_winograd4x4, WinogradPass<T, 4, Pass::kDgrad>::variant(name))
