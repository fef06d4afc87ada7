// The direct wgrad: dw[k,(r,s,c)] = sum_{n,p,q} dy * x, see gemm_wgrad.h. Takes every problem.
#include "cpu/kernels/gemm/gemm_wgrad.h"
#include "direct.h"

CONVEXT_WGRAD_VARIANTS(wgrad_direct, Algorithm::direct, reject_none, direct_cost)
