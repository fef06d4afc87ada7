// Compiled for AVX512-BF16, too.
//
// Depthwise forward pass with its epilogue: scale and shift (bias or batch norm), residual, activation.
//
//   y[n, p, q, k] = act(scale[k] * sum_{r, s} x[n, p*stride - pad + r*dil, q*stride - pad + s*dil, k / m] * w[k, r, s]
//                       + shift[k] + residual[n, p, q, k])                                              m = K / C
//
// No matrices: there is no reduction over channels, so lanes are channels and a tap is one FMA. The tiles and their
// register budget are in depthwise_window.h. FLOP per byte of x and y at stride 1: 2 * R * S / 8, 2.25 at 3 x 3: beyond
// the caches memory bounds it and the epilogue is free.
//
// Chosen for every depthwise problem: the direct kernels would leave all lanes but one of a vector idle.
#include "depthwise.h"

namespace convext::CONVEXT_ISA {
namespace {

template <class T>
const char* launch(const ConvProblem& problem, const LaunchArgs& args) {
  sum_taps(tap_sum<T>(problem, args, false), *args.parallel);
  return nullptr;
}

}  // namespace
}  // namespace convext::CONVEXT_ISA

CONVEXT_DEFINE_VARIANTS(fprop_depthwise, taps_variant<T>(name, Pass::kFprop, launch<T>))
