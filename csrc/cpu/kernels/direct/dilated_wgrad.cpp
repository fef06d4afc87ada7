// wgrad with a dilated filter: gemm_wgrad.h leaves out, for each panel of (r,s,c), the pixels that its taps see only
// padding from. That is the direct kernel's own way as well; the name lets the cost model count the taps it saves.
#include "cpu/kernels/gemm/gemm_wgrad.h"
#include "direct.h"

CONVEXT_DEFINE_VARIANTS(wgrad_dilated,
                        of_volumes(cpu_variant<T>(name, Algorithm::dilated, Pass::kWgrad, reject_undilated,
                                                  wgrad_launch<T>, dilated_work, wgrad_workspace<T>)))
