// The torch-facing side of chains of elementwise operations on the CPU (csrc/cpu/kernels/elementwise/chain.h). The op
// is private to convext; convext/swap/units/chain.py calls it, with a tensor that nobody else holds.
#include "core/select.h"
#include "cpu/kernels/elementwise/chain.h"
#include "torch_glue.h"

namespace convext {
namespace {

constexpr int64_t kKept = -2;

// Step i is operation codes[i], with operand places[i] of `operands`, what was kept where that is -2, or values[i] where
// it is -1. x is dense, with its channels in dimension 1 or, where they are `last`, innermost in memory.
void chain_(Tensor x, const std::vector<Tensor>& operands, const std::vector<int64_t>& codes,
            const std::vector<int64_t>& places, const std::vector<double>& values, bool last) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Float && x.dim() >= 2,
                  "convext_cpu: x must be a float32 CPU tensor of two dimensions or more");
  STD_TORCH_CHECK(
      !codes.empty() && codes.size() <= kChainSteps && places.size() == codes.size() && values.size() == codes.size(),
      "convext_cpu: expected 1 to ", kChainSteps, " steps, got ", codes.size());
  const int64_t channels = x.size(1), rest = x.numel() == 0 ? 0 : x.numel() / channels;
  if (rest == 0) return;
  const int64_t outer = last ? rest : x.size(0);
  std::vector<ChainStep> steps;
  for (size_t i = 0; i < codes.size(); ++i) {
    ChainStep step{static_cast<ChainOperation>(codes[i]), nullptr, static_cast<float>(values[i]), places[i] == kKept};
    if (places[i] >= 0) {
      STD_TORCH_CHECK(places[i] < static_cast<int64_t>(operands.size()), "convext_cpu: there is no operand ",
                      places[i]);
      const Tensor& operand = operands[places[i]];
      STD_TORCH_CHECK(operand.is_cpu() && operand.scalar_type() == ScalarType::Float && operand.is_contiguous() &&
                          (operand.numel() == 1 || operand.numel() == channels),
                      "convext_cpu: an operand must be float32 on the CPU, of 1 or ", channels, " values in a row");
      const float* const data = static_cast<const float*>(operand.const_data_ptr());
      if (operand.numel() == 1) {
        step.value = *data;
      } else {
        step.operand = data;
      }
    }
    steps.push_back(step);
  }
  chain_for(settings().cpu_isa)
      .run(torch_parallel(), static_cast<float*>(x.data_ptr()), outer, channels, rest / outer, steps.data(),
           static_cast<int>(steps.size()));
}

}  // namespace
}  // namespace convext

STABLE_TORCH_LIBRARY_FRAGMENT(convext_cpu, m) {
  m.def("chain_(Tensor(a!) x, Tensor[] operands, int[] codes, int[] places, float[] values, bool channels_last) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(convext_cpu, CPU, m) { m.impl("chain_", TORCH_BOX(&convext::chain_)); }
