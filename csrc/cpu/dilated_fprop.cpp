#include "gemm_passes.h"

namespace convext::CONVEXT_ISA {
namespace {
template <class T>
using DilatedFprop = GemmFprop<T, true>;
}
}  // namespace convext::CONVEXT_ISA

CONVEXT_PACKED_VARIANTS(fprop_dilated, "dilated", Pass::kFprop, reject_undilated, DilatedFprop)
