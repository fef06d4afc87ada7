#include "machine.h"

#include "core/select.h"

namespace convext {

const Roofline& roofline() {
#if defined(CONVEXT_HAVE_X86_ISAS)
  if (settings().cpu_isa == Isa::kAVX512BF16) return roofline_avx512_bf16;
#endif
  return roofline_for(settings().cpu_isa);
}

}  // namespace convext
