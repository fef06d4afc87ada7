#include "sequence_program.h"

#include <mutex>
#include <unordered_map>

namespace convext {
namespace {

std::mutex numbering;

std::unordered_map<int64_t, std::weak_ptr<SequenceProgram>>& all_programs() {
  // Outlives every caller.
  static auto* const programs = new std::unordered_map<int64_t, std::weak_ptr<SequenceProgram>>;
  return *programs;
}

}  // namespace

std::shared_ptr<SequenceProgram> SequenceProgram::make() {
  static int64_t last = 0;
  std::shared_ptr<SequenceProgram> made(new SequenceProgram);
  const std::lock_guard<std::mutex> lock(numbering);
  made->number_ = ++last;
  all_programs().emplace(last, made);
  return made;
}

std::shared_ptr<const SequenceProgram> SequenceProgram::find(int64_t number) {
  const std::lock_guard<std::mutex> lock(numbering);
  const auto found = all_programs().find(number);
  const std::shared_ptr<SequenceProgram> program = found == all_programs().end() ? nullptr : found->second.lock();
  if (program != nullptr) program->found_ = true;
  return program;
}

SequenceProgram::~SequenceProgram() {
  const std::lock_guard<std::mutex> lock(numbering);
  all_programs().erase(number_);
}

int64_t SequenceProgram::checked_value(int64_t value) const {
  // The last block is being built: its output is not there yet.
  CONVEXT_CHECK(value >= 0 && value < static_cast<int64_t>(blocks_.size()), "the program reads value ", value,
                " before it is there");
  return value;
}

void SequenceProgram::begin_block(int64_t source) {
  CONVEXT_CHECK(!found_, "the program is in use");
  CONVEXT_CHECK(blocks_.empty() || !blocks_.back().steps.empty(), "the program has a block without steps");
  blocks_.push_back({0, {}});
  blocks_.back().source = checked_value(source);
}

ProgramStep& SequenceProgram::add(StepKind kind) {
  CONVEXT_CHECK(!found_, "the program is in use");
  CONVEXT_CHECK(!blocks_.empty(), "the program has a step without a block");
  blocks_.back().steps.push_back({kind});
  ++steps_;
  return blocks_.back().steps.back();
}

void SequenceProgram::add_convolution(int64_t variant, const std::vector<int64_t>& geom, int64_t activation, bool packs,
                                      std::optional<int64_t> residual, const std::vector<bool>& present,
                                      std::optional<std::pair<int64_t, int64_t>> excite) {
  CONVEXT_CHECK(present.size() == (excite ? 9 : 5), "a step has ", present.size(), " places for tensors");
  ProgramStep& step = add(StepKind::kConvolution);
  step.variant = variant;
  step.geom = geom_of(geom);
  step.activation = static_cast<Activation>(activation);
  if (residual) step.residual = checked_value(*residual);
  step.weight = take(true);
  if (packs) step.packed = packed_++;
  int64_t* const places[] = {&step.bias,         &step.mean,          &step.var,
                             &step.gamma,        &step.beta,          &step.squeeze_weight,
                             &step.squeeze_bias, &step.excite_weight, &step.excite_bias};
  for (size_t i = 0; i < present.size(); ++i) *places[i] = take(present[i]);
  if (!excite) return;
  CONVEXT_CHECK(step.squeeze_weight != kAbsent && step.excite_weight != kAbsent,
                "squeeze and excitation must have two weights");
  step.excites = true;
  step.squeeze_activation = static_cast<Activation>(excite->first);
  step.gate = static_cast<Gate>(excite->second);
}

void SequenceProgram::add_layer_norm(bool gamma, bool beta) {
  ProgramStep& step = add(StepKind::kLayerNorm);
  step.gamma = take(gamma);
  step.beta = take(beta);
}

void SequenceProgram::add_mean() { add(StepKind::kMean); }

}  // namespace convext
