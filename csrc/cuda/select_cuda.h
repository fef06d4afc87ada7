// The cost model of the CUDA kernels.
#pragma once
#include "core/variant.h"

namespace convext {

// Modelled clock cycles of one launch on an idle GPU of the Hopper class. Compares variants with one another and with
// `cuda_copy_cost`; it is no prediction of time.
double cuda_cost(const Variant& variant, const ConvProblem& problem);

// The same for a kernel that copies `bytes` from one memory order to another.
double cuda_copy_cost(double bytes);

}  // namespace convext
