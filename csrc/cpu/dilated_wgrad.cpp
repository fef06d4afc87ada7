#include "gemm_passes.h"
#include "gemm_wgrad.h"

CONVEXT_WGRAD_VARIANTS(wgrad_dilated, "dilated", reject_undilated)
