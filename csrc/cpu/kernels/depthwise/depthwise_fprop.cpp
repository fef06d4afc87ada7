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

namespace convext {
namespace CONVEXT_ISA {
namespace {

template <class T>
const char* launch(const ConvProblem& problem, const LaunchArgs& args) {
  sum_taps<T>({height_of(problem, false), width_of(problem, false), problem.n, problem.k, problem.k / problem.c,
               static_cast<const T*>(args.a), static_cast<const compute_t<T>*>(args.b), static_cast<T*>(args.out),
               args.epilogue},
              *args.parallel);
  return nullptr;
}

}  // namespace
}  // namespace CONVEXT_ISA

#define CONVEXT_DEFINE(T, type)                                                  \
  CONVEXT_DEFINE_VARIANT(fprop_depthwise_##type) = CONVEXT_ISA::taps_variant<T>( \
      CONVEXT_VARIANT_NAME(fprop_depthwise_##type), Pass::kFprop, CONVEXT_ISA::launch<T>);
CONVEXT_FOR_ELEMENTS(CONVEXT_DEFINE)
#undef CONVEXT_DEFINE

}  // namespace convext
