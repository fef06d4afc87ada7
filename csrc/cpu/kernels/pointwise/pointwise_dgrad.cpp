// dgrad of 1x1 layers with few filters: the same product with the weights transposed (pointwise.h).
#include "pointwise.h"

namespace convext {
namespace CONVEXT_ISA {
namespace {

const char* reject(const ConvProblem& p) { return reject_unless_short_pointwise(p, p.k); }

const char* launch(const ConvProblem& p, const LaunchArgs& args) {
  run_pointwise({static_cast<const float*>(args.a), static_cast<const float*>(args.b), static_cast<float*>(args.out),
                 p.nhw(), p.k, p.c, Epilogue{}},
                *args.parallel);
  return nullptr;
}

using Packing = GemmDgrad<float, false>;

}  // namespace
}  // namespace CONVEXT_ISA

CONVEXT_DEFINE_VARIANT(dgrad_pointwise_f32) = CONVEXT_ISA::packed_by<CONVEXT_ISA::Packing>(
    CONVEXT_ISA::cpu_variant<float>(CONVEXT_VARIANT_NAME(dgrad_pointwise_f32), Algorithm::pointwise, Pass::kDgrad,
                                    CONVEXT_ISA::reject, CONVEXT_ISA::launch, CONVEXT_ISA::pointwise_cost));

}  // namespace convext
