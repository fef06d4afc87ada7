#include "gemm_passes.h"

namespace convext::CONVEXT_ISA {
namespace {
template <class T>
using DirectFprop = GemmFprop<T, false>;
}
}  // namespace convext::CONVEXT_ISA

CONVEXT_PACKED_VARIANTS(fprop_direct, "direct", Pass::kFprop, reject_none, DirectFprop)
