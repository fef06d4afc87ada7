// fprop of 3x3 filters of stride 1, dilated or not, by Winograd's F(2x2, 3x3) and F(4x4, 3x3) (winograd.h).
#include "winograd_passes.h"

CONVEXT_WINOGRAD_VARIANTS(fprop, Pass::kFprop, WinogradFprop)
