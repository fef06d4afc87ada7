#include "gemm_passes.h"

namespace convext::CONVEXT_ISA {
namespace {
template <class T>
using DilatedDgrad = GemmDgrad<T, true>;
}
}  // namespace convext::CONVEXT_ISA

CONVEXT_PACKED_VARIANTS(dgrad_dilated, "dilated", Pass::kDgrad, reject_undilated, DilatedDgrad)
