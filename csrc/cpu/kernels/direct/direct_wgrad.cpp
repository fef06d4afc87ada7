// The direct wgrad: dw[k,(r,s,c)] = sum_{n,p,q} dy * x, see gemm_wgrad.h. Takes every problem.
#include "cpu/kernels/gemm/gemm_wgrad.h"
#include "direct.h"

CONVEXT_DEFINE_VARIANTS(wgrad_direct, of_volumes(cpu_variant<T>(name, Algorithm::direct, Pass::kWgrad, reject_none,
                                                                wgrad_launch<T>, direct_work, wgrad_workspace<T>)))
