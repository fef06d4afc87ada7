// dgrad of 1x1 layers with few filters: the same product with the weights transposed (pointwise.h).
#include "pointwise.h"

namespace convext::CONVEXT_ISA {
namespace {

const char* reject(const ConvProblem& p) { return reject_unless_short_pointwise(p, p.k); }

const char* launch(const ConvProblem& p, const LaunchArgs& args) {
  run_pointwise({static_cast<const float*>(args.a), static_cast<const float*>(args.b), static_cast<float*>(args.out),
                 p.nhw(), p.k, p.c, args.epilogue},
                *args.parallel);
  return nullptr;
}

}  // namespace
}  // namespace convext::CONVEXT_ISA

CONVEXT_DEFINE_VARIANT_OF(float, f32, dgrad_pointwise,
                          packed_by<GemmDgrad<T, false>>(cpu_variant<T>(name, Algorithm::pointwise, Pass::kDgrad,
                                                                        reject, launch, pointwise_work)))
