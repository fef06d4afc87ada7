// Several convolutions in one call, from a tensor to a tensor: what lies between them is scratch memory, which stays
// warm from call to call, and nothing but kernels runs in between. The op is private to convext;
// convext/backends/native.py calls it.
//
// A sequence is made of blocks (block.h), most of one step. Value 0 is the input, value i the output of block i - 1. The
// program holds what does not change from call to call, kBlockFields numbers for a block and kStepFields for each of its
// steps; tensors are named by their position in `tensors`, kAbsent for one that is not there. What may change are the
// tensors, the version counters of the weights, and eps, one for each step.
#include <algorithm>

#include "block.h"
#include "conv_call.h"

namespace convext {
namespace {

enum BlockField { kSource, kSteps, kBlockFields };
enum StepField {
  kVariant, kGeom, kActivation = kGeom + 7, kWeight, kPacked, kBias, kMean, kVar, kGamma, kBeta,
  kResidual,  // a value
  kExcites, kSqueezeWeight, kSqueezeBias, kExciteWeight, kExciteBias, kSqueezeActivation, kGate, kStepFields
};
constexpr int64_t kAbsent = -1;

// An activation between two blocks: who made it and who reads it last, and where it lies.
struct Value {
  int64_t n = 0, c = 0, h = 0, w = 0;
  int64_t bytes = 0;
  size_t last_reader = 0;
  int64_t offset = 0;
  char* data = nullptr;
};

struct Block {
  int64_t source = 0;
  size_t first = 0, count = 0;  // of the sequence's steps
};

struct Sequence {
  View input;
  std::vector<Tensor>& tensors;
  const std::vector<int64_t>& versions;
  const std::vector<double>& eps;
  std::vector<Block> blocks;
  std::vector<BlockStep> steps;
  std::vector<const int64_t*> fields;  // of each step
  std::vector<View> weights;
  std::vector<Value> values;

  OptionalTensor tensor(int64_t at) const {
    if (at == kAbsent) return std::nullopt;
    STD_TORCH_CHECK(at >= 0 && at < static_cast<int64_t>(tensors.size()), "convext_cpu: the program names tensor ", at);
    return tensors[at];
  }

  Value& value(int64_t at) {
    STD_TORCH_CHECK(at >= 0 && at < static_cast<int64_t>(values.size()), "convext_cpu: the program reads value ", at,
                    " before it is there");
    return values[at];
  }

  void read(const std::vector<int64_t>& program) {
    values.push_back({input.size[0], input.size[1], input.size[2], input.size[3]});
    size_t at = 0;
    while (at < program.size()) {
      STD_TORCH_CHECK(at + kBlockFields <= program.size(), "convext_cpu: the program ends within a block");
      const int64_t* const f = program.data() + at;
      Block block{f[kSource], steps.size(), static_cast<size_t>(f[kSteps])};
      at += kBlockFields;
      STD_TORCH_CHECK(block.count > 0 && at + block.count * kStepFields <= program.size(),
                      "convext_cpu: the program ends within a block");
      Value& source = value(block.source);
      source.last_reader = blocks.size();
      Value out = source;
      for (size_t i = 0; i < block.count; ++i, at += kStepFields) read_step(program.data() + at, out);
      blocks.push_back(block);
      values.push_back(out);
    }
    STD_TORCH_CHECK(!blocks.empty() && versions.size() == steps.size() && eps.size() == steps.size(),
                    "convext_cpu: program, versions and eps must speak of the same steps");
  }

  // Adds a step that reads `v`, which becomes its output.
  void read_step(const int64_t* f, Value& v) {
    const OptionalTensor weight = tensor(f[kWeight]);
    STD_TORCH_CHECK(weight.has_value(), "convext_cpu: a step has no weight");
    const View wv = view_of(*weight, "w");
    STD_TORCH_CHECK(wv.dtype == input.dtype || (wv.dtype == DType::kFloat32 && dtype_size(input.dtype) == 2),
                    "convext_cpu: x and w must have one dtype");
    BlockStep step{};
    step.problem = make_problem(v.n, v.c, v.h, v.w, wv.size[0], wv.size[2], wv.size[3],
                                geom_of({f + kGeom, f + kGeom + 7}), input.dtype);
    STD_TORCH_CHECK(wv.size[1] == step.problem.c_per_group(), "convext_cpu: w holds ", wv.size[1],
                    " input channels a group, x ", step.problem.c_per_group());
    step.variant = &checked_variant(f[kVariant], Pass::kFprop, step.problem);
    STD_TORCH_CHECK(step.problem.dtype == input.dtype, "convext_cpu: ", step.variant->name, " reads another dtype");
    step.epilogue.activation = static_cast<Activation>(f[kActivation]);
    if (f[kResidual] != kAbsent) {
      Value& residual = value(f[kResidual]);
      STD_TORCH_CHECK(residual.n == v.n && residual.c == step.problem.k && residual.h == step.problem.p() &&
                          residual.w == step.problem.q(),
                      "convext_cpu: a residual must have its step's shape");
      residual.last_reader = blocks.size();
    }
    step.excites = f[kExcites] != 0;
    if (step.excites) step.excite = excite_of(f, v.c);
    steps.push_back(step);
    fields.push_back(f);
    weights.push_back(wv);
    v = {v.n, step.problem.k, step.problem.p(), step.problem.q()};
    STD_TORCH_CHECK(step.problem.y_size() > 0 && step.problem.x_size() > 0, "convext_cpu: a step has nothing to do");
    v.bytes = Scratch::padded(step.problem.y_size() * dtype_size(input.dtype));
  }

  Excite excite_of(const int64_t* f, int64_t c) const {
    const OptionalTensor squeeze = tensor(f[kSqueezeWeight]);
    STD_TORCH_CHECK(squeeze.has_value() && squeeze->dim() == 4 && squeeze->size(1) == c,
                    "convext_cpu: squeeze and excitation must read ", c, " channels");
    const int64_t squeezed = squeeze->size(0);
    const auto operand = [&](StepField field, int64_t numel) -> const float* {
      const OptionalTensor t = tensor(f[field]);
      if (!t) return nullptr;
      STD_TORCH_CHECK(t->is_cpu() && dtype_of(*t) == DType::kFloat32 && t->numel() == numel && t->is_contiguous(),
                      "convext_cpu: squeeze and excitation takes contiguous float32 tensors of ", numel, " values here");
      return static_cast<const float*>(t->const_data_ptr());
    };
    Excite excite{operand(kSqueezeWeight, squeezed * c), operand(kSqueezeBias, squeezed),
                  operand(kExciteWeight, squeezed * c), operand(kExciteBias, c)};
    STD_TORCH_CHECK(excite.w2 != nullptr, "convext_cpu: squeeze and excitation has no second weight");
    excite.c = static_cast<int32_t>(c), excite.squeezed = static_cast<int32_t>(squeezed);
    excite.activation = static_cast<Activation>(f[kSqueezeActivation]);
    excite.gate = static_cast<Gate>(f[kGate]);
    return excite;
  }

  // Places every value but the first and the last: at the lowest address that is free while it lives. Returns the bytes
  // taken in all.
  int64_t place_values() {
    int64_t top = 0;
    for (size_t i = 1; i + 1 < values.size(); ++i) {  // block i - 1 makes value i
      Value& v = values[i];
      std::vector<const Value*> alive;
      for (size_t j = 1; j < i; ++j) {
        if (values[j].last_reader >= i - 1) alive.push_back(&values[j]);
      }
      std::sort(alive.begin(), alive.end(), [](const Value* a, const Value* b) { return a->offset < b->offset; });
      for (const Value* other : alive) {
        if (v.offset + v.bytes <= other->offset) break;
        v.offset = std::max(v.offset, other->offset + other->bytes);
      }
      top = std::max(top, v.offset + v.bytes);
    }
    return top;
  }

  bool runs_in_strips(const Block& block) const { return block.count > 1; }

  std::vector<BlockStep> steps_of(const Block& block) const {
    return {steps.begin() + block.first, steps.begin() + block.first + block.count};
  }

  int64_t workspace(const Block& block, const Parallel& parallel) const {
    if (runs_in_strips(block)) return Scratch::padded(block_workspace(steps_of(block), parallel.threads));
    return workspace_bytes(*steps[block.first].variant, steps[block.first].problem, parallel);
  }

  void run(const Block& block, void* out, void* memory, const Parallel& parallel) const {
    const Value& source = values[block.source];
    if (runs_in_strips(block)) {
      const char* const failure = run_block(steps_of(block), source.data, out, memory,
                                            squeeze_excite_for(settings().cpu_isa), parallel);
      STD_TORCH_CHECK(failure == nullptr, "convext_cpu: a step of a block failed: ", failure);
      return;
    }
    const BlockStep& step = steps[block.first];
    LaunchArgs args{};
    args.a = source.data;
    args.b = step.weights;
    args.out = out;
    args.epilogue = step.epilogue;
    args.workspace = memory;
    args.parallel = &parallel;
    launch(*step.variant, step.problem, args);
  }
};

Tensor sequence(std::vector<int64_t> program, const Tensor& x, std::vector<Tensor> tensors,
                std::vector<int64_t> versions, std::vector<double> eps) {
  Sequence s{view_of(x, "x"), tensors, versions, eps, {}, {}, {}, {}, {}};
  s.read(program);
  BlockStep& head = s.steps[0];
  if (!s.input.is_dense(Layout::kNHWC)) {
    STD_TORCH_CHECK(s.blocks[0].count == 1 && head.variant->layouts == Layouts::kAny && s.input.is_dense(Layout::kNCHW),
                    "convext_cpu: a sequence's input must be dense in a layout that its first kernel reads");
    head.problem.x_layout = Layout::kNCHW;
  }
  for (const Block& block : s.blocks) {
    if (!s.runs_in_strips(block)) {
      STD_TORCH_CHECK(!s.steps[block.first].excites, "convext_cpu: a block begins with squeeze and excitation");
    } else if (const char* const why = reject_block(s.steps_of(block))) {
      STD_TORCH_CHECK(false, "convext_cpu: the steps cannot run as a block: ", why);
    }
  }
  const Value& last = s.values.back();
  Tensor y = empty_activation(last.n, last.c, last.h, last.w, s.input.dtype, true);

  const Staging& staging = staging_for(settings().cpu_isa);
  const Parallel& parallel = torch_parallel();
  const DType accumulate = head.problem.accumulate_dtype();
  const auto norm_of = [&](size_t i, auto&& use) {
    const int64_t* const f = s.fields[i];
    const OptionalTensor bias = s.tensor(f[kBias]), mean = s.tensor(f[kMean]), var = s.tensor(f[kVar]),
                         gamma = s.tensor(f[kGamma]), beta = s.tensor(f[kBeta]);
    use(BatchNormTensors{bias, mean, var, gamma, beta, eps[i]});
  };
  const auto with_weights = [&](size_t i, auto&& use) {
    const OptionalTensor packed = s.tensor(s.fields[i][kPacked]);
    use(Weights{*s.steps[i].variant, s.steps[i].problem, s.weights[i], packed, versions[i]});
  };
  int64_t bytes = 0, workspace = 0;
  for (size_t i = 0; i < s.steps.size(); ++i) {
    norm_of(i, [&](const BatchNormTensors& norm) { bytes += norm.scratch_bytes(s.steps[i].problem.k, accumulate); });
    with_weights(i, [&](const Weights& weights) { bytes += weights.scratch_bytes(); });
  }
  for (const Block& block : s.blocks) workspace = std::max(workspace, s.workspace(block, parallel));
  const int64_t value_bytes = s.place_values();
  const ScratchScope scope(bytes + workspace + value_bytes);
  char* const memory = static_cast<char*>(scratch().take(value_bytes));
  for (Value& v : s.values) v.data = memory + v.offset;
  s.values.front().data = static_cast<char*>(s.input.data);
  s.values.back().data = static_cast<char*>(view_of(y, "y").data);
  void* const work = scratch().take(workspace);
  for (size_t b = 0; b < s.blocks.size(); ++b) {
    const Block& block = s.blocks[b];
    for (size_t i = block.first; i < block.first + block.count; ++i) {
      BlockStep& step = s.steps[i];
      norm_of(i, [&](const BatchNormTensors& norm) {
        if (accumulate == DType::kFloat64) {
          norm.fold<double>(step.problem.k, step.epilogue);
        } else {
          norm.fold<float>(step.problem.k, step.epilogue);
        }
      });
      with_weights(i, [&](const Weights& weights) { step.weights = weights.get(staging, parallel); });
      if (s.fields[i][kResidual] == kAbsent) continue;
      STD_TORCH_CHECK(s.fields[i][kResidual] > 0 || s.input.is_dense(Layout::kNHWC),
                      "convext_cpu: a residual must be dense channels-last");
      step.epilogue.residual = s.values[s.fields[i][kResidual]].data;
    }
    s.run(block, s.values[b + 1].data, work, parallel);
  }
  return y;
}

}  // namespace
}  // namespace convext

STABLE_TORCH_LIBRARY_FRAGMENT(convext_cpu, m) {
  m.def("sequence(int[] program, Tensor x, Tensor[] tensors, int[] versions, float[] eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(convext_cpu, CPU, m) { m.impl("sequence", TORCH_BOX(&convext::sequence)); }
