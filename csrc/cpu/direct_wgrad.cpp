#include "gemm_passes.h"
#include "gemm_wgrad.h"

CONVEXT_WGRAD_VARIANTS(wgrad_direct, "direct", reject_none)
