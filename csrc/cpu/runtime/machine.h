// What this machine is measured by.
#pragma once
#include "core/api.h"
#include "cpu/kernels/roofline/roofline.h"

namespace convext {

// Of the instruction set in use.
CONVEXT_API const Roofline& roofline();

}  // namespace convext
