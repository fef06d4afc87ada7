// Compiled for AVX512-BF16, too.
//
// Depthwise input gradient.
//
//   dx[n, d, h, w, c] = sum over the m filters k of c, and the taps (t, r, s) with h + pad - r*dil = p*stride (d, w likewise),
//                    of dy[n, z, p, q, k] * w[k, t, r, s]
//
// At stride 1 this is the forward pass with its taps walked backwards. At stride 2 each of the 2 x 2 classes of dx
// pixels meets its own quarter of the taps (3 x 3: 2x2, 2x1, 1x2 and 1x1 of them), so that no product with an inserted
// zero is computed: 9 FMAs for 4 pixels of dx, as few as in the forward pass. Tiles: depthwise_window.h.
//
// Chosen for every depthwise problem. A channel multiplier sums its filters' lanes at the end of a tile.
#include "depthwise.h"

namespace convext::CONVEXT_ISA {
namespace {

template <class T>
const char* launch(const ConvProblem& problem, const LaunchArgs& args) {
  const TapSum<T> sum = tap_sum<T>(problem, args, true);
  if (sum.multiplier == 1) {
    sum_taps(sum, *args.parallel);
  } else {
    sum_taps_and_filters(sum, *args.parallel);
  }
  return nullptr;
}

}  // namespace
}  // namespace convext::CONVEXT_ISA

CONVEXT_DEFINE_VARIANTS(dgrad_depthwise, taps_variant<T>(name, Pass::kDgrad, launch<T>))
