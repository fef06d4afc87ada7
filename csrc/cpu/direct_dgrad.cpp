#include "gemm_passes.h"

namespace convext::CONVEXT_ISA {
namespace {
template <class T>
using DirectDgrad = GemmDgrad<T, false>;
}
}  // namespace convext::CONVEXT_ISA

CONVEXT_PACKED_VARIANTS(dgrad_direct, "direct", Pass::kDgrad, reject_none, DirectDgrad)
