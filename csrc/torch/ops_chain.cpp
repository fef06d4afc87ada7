// The torch-facing side of chains of elementwise operations on the CPU (csrc/cpu/kernels/elementwise/chain.h). The ops
// are private to convext; convext/chain.py calls them.
#include <tuple>

#include "core/select.h"
#include "cpu/kernels/elementwise/chain.h"
#include "torch_glue.h"

namespace convext {
namespace {

constexpr int64_t kKept = -2;

// x as a chain sees it, and the steps that its arguments say: step i is operation codes[i], with operand places[i] of
// `operands`, what was kept where that is -2, or values[i] where it is -1. x is dense, with its channels in dimension 1
// or, where they are `last`, innermost in memory.
struct ChainCall {
  int64_t channels, outer = 0, inner = 0;
  std::vector<ChainStep> steps;

  ChainCall(const Tensor& x, const std::vector<Tensor>& operands, const std::vector<int64_t>& codes,
            const std::vector<int64_t>& places, const std::vector<double>& values, bool last) {
    STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Float && x.dim() >= 2,
                    "convext_cpu: x must be a float32 CPU tensor of two dimensions or more");
    STD_TORCH_CHECK(
        !codes.empty() && codes.size() <= kChainSteps && places.size() == codes.size() && values.size() == codes.size(),
        "convext_cpu: expected 1 to ", kChainSteps, " steps, got ", codes.size());
    channels = x.size(1);
    const int64_t rest = x.numel() == 0 ? 0 : x.numel() / channels;
    if (rest != 0) outer = last ? rest : x.size(0), inner = rest / outer;
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
  }

  int count() const { return static_cast<int>(steps.size()); }

  void run(const Tensor& x, const Tensor& z) const {
    if (outer == 0) return;
    chain_for(settings().cpu_isa)
        .run(torch_parallel(), static_cast<const float*>(x.const_data_ptr()), static_cast<float*>(z.data_ptr()), outer,
             channels, inner, steps.data(), count());
  }
};

Tensor dense_like(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  return empty(sizes.data(), strides.data(), x.dim(), DType::kFloat32);
}

// Over x.
void overwrite_by_chain(Tensor x, const std::vector<Tensor>& operands, const std::vector<int64_t>& codes,
                        const std::vector<int64_t>& places, const std::vector<double>& values, bool last) {
  ChainCall(x, operands, codes, places, values, last).run(x, x);
}

Tensor run_chain(const Tensor& x, const std::vector<Tensor>& operands, const std::vector<int64_t>& codes,
                 const std::vector<int64_t>& places, const std::vector<double>& values, bool last) {
  const ChainCall call(x, operands, codes, places, values, last);
  Tensor z = dense_like(x);
  call.run(x, z);
  return z;
}

// `saved` is x, or with `by_output` what the chain made of it (kernels/elementwise/chain.h), and dout is in its strides.
// sums (steps, C) has a row for each step, of which those hold something whose operand is `wanted`.
std::tuple<Tensor, Tensor> chain_backward(const Tensor& dout, const Tensor& saved, const std::vector<Tensor>& operands,
                                          const std::vector<int64_t>& codes, const std::vector<int64_t>& places,
                                          const std::vector<double>& values, bool last, bool by_output,
                                          const std::vector<int64_t>& wanted) {
  const ChainCall call(saved, operands, codes, places, values, last);
  const auto equal = [](const auto& a, const auto& b) {
    if (a.size() != b.size()) return false;
    for (size_t i = 0; i < a.size(); ++i) {
      if (a[i] != b[i]) return false;
    }
    return true;
  };
  STD_TORCH_CHECK(dout.is_cpu() && dout.scalar_type() == ScalarType::Float && equal(dout.sizes(), saved.sizes()) &&
                      equal(dout.strides(), saved.strides()),
                  "convext_cpu: dout must have the dtype, size and strides of what was saved");
  STD_TORCH_CHECK(wanted.size() == codes.size(), "convext_cpu: expected one of `wanted` for each step");
  Tensor dx = dense_like(saved);
  Tensor sums = empty_matrix(call.count(), call.channels, DType::kFloat64);
  if (call.outer == 0) return {dx, torch::stable::zero_(sums)};
  ChainGradients gradients{static_cast<const float*>(dout.const_data_ptr()),
                           static_cast<const float*>(saved.const_data_ptr()),
                           by_output,
                           static_cast<float*>(dx.data_ptr()),
                           {}};
  for (int i = 0; i < call.count(); ++i) {
    if (wanted[i] != 0) gradients.sums[i] = static_cast<double*>(sums.data_ptr()) + i * call.channels;
  }
  const Chain& kernels = chain_for(settings().cpu_isa);
  const int64_t bytes = kernels.workspace(gradients, call.outer, call.channels, call.inner, call.count());
  const ScratchScope scope(bytes);
  kernels.backward(torch_parallel(), gradients, call.outer, call.channels, call.inner, call.steps.data(), call.count(),
                   scratch().take(bytes));
  return {dx, sums};
}

}  // namespace
}  // namespace convext

STABLE_TORCH_LIBRARY_FRAGMENT(convext_cpu, m) {
  m.def("chain_(Tensor(a!) x, Tensor[] operands, int[] codes, int[] places, float[] values, bool channels_last) -> ()");
  m.def("chain(Tensor x, Tensor[] operands, int[] codes, int[] places, float[] values, bool channels_last) -> Tensor");
  m.def(
      "chain_backward(Tensor dout, Tensor saved, Tensor[] operands, int[] codes, int[] places, float[] values, "
      "bool channels_last, bool by_output, int[] wanted) -> (Tensor dx, Tensor sums)");
}

STABLE_TORCH_LIBRARY_IMPL(convext_cpu, CPU, m) {
  m.impl("chain_", TORCH_BOX(&convext::overwrite_by_chain));
  m.impl("chain", TORCH_BOX(&convext::run_chain));
  m.impl("chain_backward", TORCH_BOX(&convext::chain_backward));
}
