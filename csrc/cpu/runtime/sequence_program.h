// What several convolutions in one call are, without their tensors: built once, by convext/backends/native_sequence.py,
// and read by sequence.h.
//
// A sequence is made of blocks (block.h), most of one step. Value 0 is its input, value i the output of block i - 1.
// The steps' tensors are numbered in the order of the steps, those that are there: of a convolution the weight, bias,
// mean, var, gamma, beta, and weight and bias of each of the two convolutions of a squeeze and excitation. Packed
// weights (packed_weight.h) are numbered by themselves, in the order of the convolutions that have one.
#pragma once
#include <memory>
#include <optional>
#include <vector>

#include "core/api.h"
#include "core/epilogue.h"
#include "cpu/kernels/elementwise/squeeze_excite.h"
#include "view.h"

namespace convext {

// A convolution, or a linear layer, whose weight has two dimensions; a LayerNorm over the channels of every pixel
// (layer_norm.h), with gamma and beta alone; the mean over the pixels (mean.h), without tensors.
enum class StepKind { kConvolution, kLayerNorm, kMean };

constexpr int64_t kAbsent = -1;

struct ProgramStep {
  StepKind kind;
  int64_t variant = 0;  // its index
  Geom geom{};
  Activation activation = Activation::identity;
  int64_t residual = kAbsent;  // a value
  int64_t packed = kAbsent;    // number of the packed weight
  // Numbers of tensors.
  int64_t weight = kAbsent, bias = kAbsent, mean = kAbsent, var = kAbsent, gamma = kAbsent, beta = kAbsent;
  // Squeeze and excitation of the input, in front of the convolution.
  bool excites = false;
  int64_t squeeze_weight = kAbsent, squeeze_bias = kAbsent, excite_weight = kAbsent, excite_bias = kAbsent;
  Activation squeeze_activation = Activation::identity;
  Gate gate = Gate::sigmoid;
};

struct ProgramBlock {
  int64_t source;  // the value that its first step reads
  std::vector<ProgramStep> steps;
};

class CONVEXT_API SequenceProgram {
 public:
  // Known under number() as long as it lives. Who finds one relies on it: it takes no more steps.
  static std::shared_ptr<SequenceProgram> make();
  static std::shared_ptr<const SequenceProgram> find(int64_t number);
  ~SequenceProgram();

  int64_t number() const { return number_; }
  const std::vector<ProgramBlock>& blocks() const { return blocks_; }
  int64_t steps() const { return steps_; }
  int64_t tensors() const { return tensors_; }
  int64_t packed() const { return packed_; }

  // Steps are added to the last block.
  void begin_block(int64_t source);
  // present: bias, mean, var, gamma, beta and, with `excite`, its four tensors, in order.
  void add_convolution(int64_t variant, const std::vector<int64_t>& geom, int64_t activation, bool packs,
                       std::optional<int64_t> residual, const std::vector<bool>& present,
                       std::optional<std::pair<int64_t, int64_t>> excite);  // (activation, gate)
  void add_layer_norm(bool gamma, bool beta);
  void add_mean();

 private:
  SequenceProgram() = default;
  ProgramStep& add(StepKind kind);
  int64_t take(bool there) { return there ? tensors_++ : kAbsent; }
  int64_t checked_value(int64_t value) const;

  int64_t number_ = 0, steps_ = 0, tensors_ = 0, packed_ = 0;
  bool found_ = false;
  std::vector<ProgramBlock> blocks_;
};

}  // namespace convext
