// Several convolutions in one call, from a tensor to a tensor: what lies between them is scratch memory, which stays
// warm from call to call, and nothing but kernels runs in between. The ops are private to convext;
// convext/backends/native.py calls them.
//
// A sequence is made of blocks (block.h), most of one step. Value 0 is the input, value i the output of block i - 1. The
// program holds what does not change from call to call, kBlockFields numbers for a block and kStepFields for each of its
// steps; tensors are named by their position in `tensors`, kAbsent for one that is not there. Program, tensors and eps, one
// for each step, are handed over once, and kept under a number: to pass hundreds of tensors took longer than some layers
// do. A call brings the input and the version counters of the weights. Everything that is in a tensor, its address and
// extents too, is read anew in each call; what follows from extents alone (kernels' consent, places in memory) is kept
// with the program, and worked out again where an extent, the input's order, the threads or the instruction set differ.
//
// A weight in two dimensions is a linear layer's, a 1x1 filter over the channels. A step whose variant is kLayerNorm
// normalises the channels of every pixel (cpu/layer_norm.h): of its tensors gamma and beta may be there. One whose variant
// is kPixelMean takes the mean over the pixels (cpu/mean.h), and has no tensors.
//
// A batch goes through the sequence in phases (phases.h): in some each thread takes images of its own through many
// blocks, in others all threads share each block. Values that one phase makes and another reads hold the whole batch.
#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "cpu/runtime/block.h"
#include "conv_call.h"
#include "cpu/kernels/elementwise/layer_norm.h"
#include "cpu/kernels/elementwise/mean.h"
#include "cpu/runtime/phases.h"

namespace convext {
namespace {

enum BlockField { kSource, kSteps, kBlockFields };
enum StepField {
  kVariant, kGeom, kActivation = kGeom + 7, kWeight, kPacked, kBias, kMean, kVar, kGamma, kBeta,
  kResidual,  // a value
  kExcites, kSqueezeWeight, kSqueezeBias, kExciteWeight, kExciteBias, kSqueezeActivation, kGate, kStepFields
};
constexpr int64_t kAbsent = -1, kLayerNorm = -1, kPixelMean = -2;

// The weight of a step as a filter bank.
View filters_of(const Tensor& w) {
  if (w.dim() == 4) return view_of(w, "w");
  STD_TORCH_CHECK(w.is_cpu() && w.dim() == 2, "convext_cpu: w must be a CPU tensor of 4 or 2 dimensions");
  return {{w.size(0), w.size(1), 1, 1}, {w.stride(0), w.stride(1), 1, 1}, dtype_of(w), w.data_ptr()};
}

// An activation between two blocks: who reads it last, and where it lies.
struct Value {
  int64_t n = 0, c = 0, h = 0, w = 0;
  int64_t image_bytes = 0;
  size_t last_reader = 0;
  int64_t images = 0;  // that it holds: the whole batch, or those that go together through the phase that makes it
  int64_t offset = 0;  // in the memory of the whole batch's values, or in a thread's own
  char* data = nullptr;  // of the whole batch; nullptr for a thread's own
};

struct Block {
  int64_t source = 0;
  size_t first = 0, count = 0;  // of the sequence's steps
};

// A thread's memory in a phase: its own values and workspace.
struct Lane {
  char *values, *workspace;
};

// What is handed over once.
struct Given {
  std::vector<int64_t> program;
  std::vector<OptionalTensor> tensors;
  std::vector<double> eps;
  bool flat;  // the result is (N, C), which its one pixel is
};

struct Sequence {
  View input;
  const Given& given;
  int32_t threads;
  Isa isa;
  std::vector<Block> blocks;
  std::vector<BlockStep> steps;
  std::vector<const int64_t*> fields;  // of each step
  std::vector<View> weights;
  std::vector<Value> values;
  std::vector<Phase> parts;
  int64_t batch_bytes = 0, lane_bytes = 0;  // of the values, in the memory of the whole batch and in that of a thread
  int64_t shared_bytes = 0, own_bytes = 0;  // of workspace, for all threads together and for each

  Sequence(const View& x, const Given& all, int32_t num_threads, Isa set)
      : input(x), given(all), threads(num_threads), isa(set) {
    read(given.program);
    BlockStep& head = steps[0];
    if (!input.is_dense(Layout::kNHWC)) {
      STD_TORCH_CHECK(blocks[0].count == 1 && head.variant->layouts == Layouts::kAny && input.is_dense(Layout::kNCHW),
                      "convext_cpu: a sequence's input must be dense in a layout that its first kernel reads");
      head.problem.x_layout = Layout::kNCHW;
      for (const int64_t* const f : fields) {
        STD_TORCH_CHECK(f[kResidual] != 0, "convext_cpu: a residual must be dense channels-last");
      }
    }
    for (const Block& block : blocks) {
      if (!runs_in_strips(block)) {
        STD_TORCH_CHECK(!steps[block.first].excites, "convext_cpu: a block begins with squeeze and excitation");
      } else if (const char* const why = reject_block(steps_of(block, 0, input.size[0], {}))) {
        STD_TORCH_CHECK(false, "convext_cpu: the steps cannot run as a block: ", why);
      }
    }
    const Value& last = values.back();
    STD_TORCH_CHECK(!given.flat || (last.h == 1 && last.w == 1), "convext_cpu: the result has more than one pixel");
    place_values();
    for (const Phase& phase : parts) {
      int64_t& bytes = shares(phase) ? shared_bytes : own_bytes;
      bytes = std::max(bytes, workspace(phase, shares(phase) ? threads : 1));
    }
  }

  // Whether all this holds for a call: the same input but for its address, and weights as large as they were, those of
  // squeeze and excitation among them, for which there is memory. Notes where the weights lie now.
  bool still_fits(const View& x, int32_t num_threads, Isa set) {
    if (std::memcmp(x.size, input.size, sizeof x.size) != 0 || std::memcmp(x.stride, input.stride, sizeof x.stride) != 0 ||
        x.dtype != input.dtype || num_threads != threads || set != isa) {
      return false;
    }
    input.data = x.data;
    for (size_t i = 0; i < steps.size(); ++i) {
      if (!has_weights(i)) continue;
      const View now = filters_of(*tensor(fields[i][kWeight]));
      if (std::memcmp(now.size, weights[i].size, sizeof now.size) != 0 || now.dtype != weights[i].dtype) return false;
      weights[i] = now;
      if (!steps[i].excites) continue;
      const Excite excite = excite_of(fields[i], steps[i].problem.c);
      if (excite.squeezed != steps[i].excite.squeezed) return false;
      steps[i].excite = excite;
    }
    return true;
  }

  const OptionalTensor& tensor(int64_t at) const {
    static const OptionalTensor absent;
    if (at == kAbsent) return absent;
    STD_TORCH_CHECK(at >= 0 && at < static_cast<int64_t>(given.tensors.size()), "convext_cpu: the program names tensor ",
                    at);
    return given.tensors[at];
  }

  Value& value(int64_t at) {
    STD_TORCH_CHECK(at >= 0 && at < static_cast<int64_t>(values.size()), "convext_cpu: the program reads value ", at,
                    " before it is there");
    return values[at];
  }

  void read(const std::vector<int64_t>& program) {
    values.push_back({input.size[0], input.size[1], input.size[2], input.size[3]});
    values[0].image_bytes = input.numel() / input.size[0] * dtype_size(input.dtype);
    values[0].images = input.size[0];
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
    STD_TORCH_CHECK(!blocks.empty() && given.eps.size() == steps.size(),
                    "convext_cpu: program and eps must speak of the same steps");
  }

  bool is_norm(size_t step) const { return fields[step][kVariant] == kLayerNorm; }
  bool is_mean(size_t step) const { return fields[step][kVariant] == kPixelMean; }
  bool has_weights(size_t step) const { return !is_norm(step) && !is_mean(step); }

  // Adds a step that reads `v`, which becomes its output.
  void read_step(const int64_t* f, Value& v) {
    if (f[kVariant] == kLayerNorm) return read_norm(f, v);
    if (f[kVariant] == kPixelMean) return read_mean(f, v);
    const OptionalTensor& weight = tensor(f[kWeight]);
    STD_TORCH_CHECK(weight.has_value(), "convext_cpu: a step has no weight");
    const View wv = filters_of(*weight);
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
    add(f, step, wv, v);
  }

  void read_norm(const int64_t* f, Value& v) {
    add_layer(f, make_problem(v.n, v.c, v.h, v.w, v.c, 1, 1, {1, 1, 0, 0, 1, 1, 1}, input.dtype),
              layer_norm_for(isa, input.dtype), v);
  }

  void read_mean(const int64_t* f, Value& v) {
    const Geom whole{1, 1, 0, 0, 1, 1, static_cast<int32_t>(v.c)};
    add_layer(f, make_problem(v.n, v.c, v.h, v.w, v.c, v.h, v.w, whole, input.dtype),
              mean_for(isa, input.dtype), v);
  }

  // Adds a step without weights.
  void add_layer(const int64_t* f, const ConvProblem& problem, const Variant* variant, Value& v) {
    STD_TORCH_CHECK(variant != nullptr, "convext_cpu: a layer that is no convolution has no kernel for this dtype");
    BlockStep step{};
    step.problem = problem;
    step.variant = variant;
    add(f, step, View{}, v);
  }

  void add(const int64_t* f, const BlockStep& step, const View& weight, Value& v) {
    const ConvProblem& p = step.problem;
    STD_TORCH_CHECK(p.y_size() > 0 && p.x_size() > 0, "convext_cpu: a step has nothing to do");
    steps.push_back(step);
    fields.push_back(f);
    weights.push_back(weight);
    v = {v.n, p.k, p.p(), p.q()};
    v.image_bytes = p.y_size() / v.n * dtype_size(input.dtype);
  }

  Excite excite_of(const int64_t* f, int64_t c) const {
    const OptionalTensor& squeeze = tensor(f[kSqueezeWeight]);
    STD_TORCH_CHECK(squeeze.has_value() && squeeze->dim() == 4 && squeeze->size(1) == c,
                    "convext_cpu: squeeze and excitation must read ", c, " channels");
    const int64_t squeezed = squeeze->size(0);
    const auto operand = [&](StepField field, int64_t numel) -> const float* {
      const OptionalTensor& t = tensor(f[field]);
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

  // What a block moves, for the choice of phases.
  LayerBytes bytes_of(size_t b) const {
    const Block& block = blocks[b];
    const int64_t output = values[b + 1].image_bytes;
    LayerBytes moved{0, values[block.source].image_bytes + output, output};
    for (size_t i = block.first; i < block.first + block.count; ++i) {
      const BlockStep& step = steps[i];
      const bool packs = step.variant->pack_format != nullptr && step.variant->pack_format(step.problem) != nullptr;
      moved.weights += packs        ? step.variant->packed_size(step.problem)
                       : is_mean(i) ? 0
                       : is_norm(i) ? 2 * step.problem.c * dtype_size(step.problem.dtype)
                                    : step.problem.w_size() * dtype_size(step.problem.dtype);
      if (fields[i][kResidual] != kAbsent) moved.image += values[fields[i][kResidual]].image_bytes;
    }
    return moved;
  }

  // Chooses the phases and places every value but the first and the last: at the lowest address that is free while it
  // lives, in the memory of the whole batch or in that of a thread.
  void place_values() {
    std::vector<LayerBytes> layers;
    for (size_t b = 0; b < blocks.size(); ++b) layers.push_back(bytes_of(b));
    parts = phases(layers, input.size[0], threads, 2 * block_cache_budget());
    for (const Phase& phase : parts) {
      for (int64_t b = phase.first; b < phase.first + phase.count; ++b) {
        Value& v = values[b + 1];
        const bool crosses = static_cast<int64_t>(v.last_reader) >= phase.first + phase.count;
        v.images = crosses || b + 2 == static_cast<int64_t>(values.size()) ? v.n : phase.images;
        // While a phase runs, other images may still need what this one has read for the last time.
        if (b + 2 < static_cast<int64_t>(values.size())) place(b + 1, whole(v) && !shares(phase) ? phase.first : b);
      }
    }
  }

  // Places value i beside those of its memory that block `from` or a later one reads.
  void place(size_t i, size_t from) {
    Value& v = values[i];
    const auto end = [](const Value& value) { return value.offset + Scratch::padded(value.images * value.image_bytes); };
    std::vector<const Value*> alive;
    for (size_t j = 1; j < i; ++j) {
      if (values[j].last_reader >= from && whole(values[j]) == whole(v)) alive.push_back(&values[j]);
    }
    std::sort(alive.begin(), alive.end(), [](const Value* a, const Value* b) { return a->offset < b->offset; });
    for (const Value* other : alive) {
      if (end(v) <= other->offset) break;
      v.offset = std::max(v.offset, end(*other));
    }
    int64_t& top = whole(v) ? batch_bytes : lane_bytes;
    top = std::max(top, end(v));
  }

  static bool whole(const Value& v) { return v.images == v.n; }
  bool shares(const Phase& phase) const { return phase.images == input.size[0]; }
  bool runs_in_strips(const Block& block) const { return block.count > 1; }

  // Where a value lies from an image on.
  char* at(const Value& v, int64_t image, const Lane& lane) const {
    return whole(v) ? v.data + image * v.image_bytes : lane.values + v.offset;
  }

  // The steps of a block for some of the images.
  std::vector<BlockStep> steps_of(const Block& block, int64_t image, int64_t count, const Lane& lane) const {
    std::vector<BlockStep> some(steps.begin() + block.first, steps.begin() + block.first + block.count);
    for (size_t i = 0; i < block.count; ++i) {
      some[i].problem.n = static_cast<int32_t>(count);
      const int64_t residual = fields[block.first + i][kResidual];
      if (residual != kAbsent) some[i].epilogue.residual = at(values[residual], image, lane);
    }
    return some;
  }

  int64_t workspace(const Phase& phase, int32_t sharing) const {
    int64_t most = 0;
    for (int64_t b = phase.first; b < phase.first + phase.count; ++b) {
      const std::vector<BlockStep> some = steps_of(blocks[b], 0, phase.images, {});
      const auto needed = some[0].variant->workspace;
      most = std::max(most, runs_in_strips(blocks[b]) ? block_workspace(some, sharing)
                            : needed != nullptr       ? needed(some[0].problem, sharing)
                                                      : 0);
    }
    return Scratch::padded(most);
  }

  // Runs a block for some of the images. Returns nullptr, or what went wrong in words.
  const char* run(int64_t b, int64_t image, int64_t count, const Lane& lane, const Parallel& parallel) const {
    const Block& block = blocks[b];
    const std::vector<BlockStep> some = steps_of(block, image, count, lane);
    const char* const in = at(values[block.source], image, lane);
    char* const out = at(values[b + 1], image, lane);
    if (runs_in_strips(block)) {
      return run_block(some, in, out, lane.workspace, squeeze_excite_for(isa), parallel);
    }
    LaunchArgs args{};
    args.a = in;
    args.b = some[0].weights;
    args.out = out;
    args.epilogue = some[0].epilogue;
    args.workspace = lane.workspace;
    args.parallel = &parallel;
    return some[0].variant->launch(some[0].problem, args);
  }

  BatchNormTensors norm_of(size_t step) const {
    const int64_t* const f = fields[step];
    return {tensor(f[kBias]), tensor(f[kMean]), tensor(f[kVar]), tensor(f[kGamma]), tensor(f[kBeta]), given.eps[step]};
  }
  Weights weights_of(size_t step, int64_t version) const {
    return {*steps[step].variant, steps[step].problem, weights[step], tensor(fields[step][kPacked]), version};
  }

  DType accumulate_dtype() const { return steps[0].problem.accumulate_dtype(); }

  // What `prepare` takes of the scratch memory for all steps.
  int64_t scratch_bytes() const {
    int64_t bytes = 0;
    for (size_t i = 0; i < steps.size(); ++i) {
      bytes += norm_of(i).scratch_bytes(steps[i].problem.k, accumulate_dtype());
      if (has_weights(i)) bytes += weights_of(i, 0).scratch_bytes();
    }
    return bytes;
  }

  // Asks for what `prepare` is going to look at.
  void read_ahead(int64_t b) const {
    for (size_t i = blocks[b].first; i < blocks[b].first + blocks[b].count; ++i) {
      norm_of(i).read_ahead();
      if (has_weights(i)) weights_of(i, 0).read_ahead();
    }
  }

  // Batch norms and weights of a block as its kernels take them.
  void prepare(int64_t b, const std::vector<int64_t>& versions, const Staging& staging, const Parallel& parallel) {
    for (size_t i = blocks[b].first; i < blocks[b].first + blocks[b].count; ++i) {
      BlockStep& step = steps[i];
      if (accumulate_dtype() == DType::kFloat64) {
        norm_of(i).fold<double>(step.problem.k, step.epilogue);
      } else {
        norm_of(i).fold<float>(step.problem.k, step.epilogue);
      }
      if (is_norm(i)) step.weights = &given.eps[i];
      if (has_weights(i)) step.weights = weights_of(i, versions[i]).get(staging, parallel);
    }
  }

  // Runs a phase; `lanes`: memory for each thread, the first one's for all threads together.
  void run(const Phase& phase, const std::vector<Lane>& lanes, const std::vector<int64_t>& versions,
           const Parallel& parallel) {
    const Staging& staging = staging_for(isa);
    const int64_t end = phase.first + phase.count;
    std::atomic<const char*> failure{nullptr};
    if (shares(phase)) {
      for (int64_t b = phase.first; b < end; ++b) {
        prepare(b, versions, staging, parallel);
        // While a block runs, what the next one's weights are judged by comes from memory.
        if (b + 1 < static_cast<int64_t>(blocks.size())) read_ahead(b + 1);
        if (const char* const why = run(b, 0, input.size[0], lanes[0], parallel)) failure = why;
      }
    } else {
      for (int64_t b = phase.first; b < end; ++b) read_ahead(b);
      for (int64_t b = phase.first; b < end; ++b) prepare(b, versions, staging, parallel);
      const int64_t each = input.size[0] / threads;
      parallel.for_each(threads, [&](int64_t t) {
        for (int64_t image = t * each; image < (t + 1) * each; image += phase.images) {
          for (int64_t b = phase.first; b < end; ++b) {
            if (const char* const why = run(b, image, phase.images, lanes[t], {nullptr, 1})) failure = why;
          }
        }
      });
    }
    STD_TORCH_CHECK(failure == nullptr, "convext_cpu: a step of a sequence failed: ", failure.load());
  }
};

// What is kept under a number: what was given, and the Sequence of a call that is over, for the next one.
struct Kept {
  Given given;
  std::unique_ptr<Sequence> idle;
};

std::mutex keeping;

std::unordered_map<int64_t, std::shared_ptr<Kept>>& all_kept() {
  static auto* const kept = new std::unordered_map<int64_t, std::shared_ptr<Kept>>;  // outlives every caller
  return *kept;
}

int64_t keep_sequence(std::vector<int64_t> program, std::vector<Tensor> tensors, std::vector<double> eps, bool flat) {
  static int64_t last = 0;
  auto kept = std::make_shared<Kept>(Kept{
      {std::move(program), {tensors.begin(), tensors.end()}, std::move(eps), flat}, nullptr});
  const std::lock_guard<std::mutex> lock(keeping);
  all_kept().emplace(++last, std::move(kept));
  return last;
}

void drop_sequence(int64_t number) {
  std::shared_ptr<Kept> dropped;  // its tensors are freed outside the lock
  const std::lock_guard<std::mutex> lock(keeping);
  const auto found = all_kept().find(number);
  if (found == all_kept().end()) return;
  dropped = std::move(found->second);
  all_kept().erase(found);
}

// A Sequence for the length of a call. Calls in several threads at once have one each; the next call takes over one of
// them.
class Borrowed {
 public:
  Borrowed(int64_t number, const View& x, int32_t threads, Isa isa) {
    {
      const std::lock_guard<std::mutex> lock(keeping);
      const auto found = all_kept().find(number);
      STD_TORCH_CHECK(found != all_kept().end(), "convext_cpu: there is no sequence ", number);
      kept_ = found->second;
      sequence_ = std::move(kept_->idle);
    }
    if (sequence_ == nullptr || !sequence_->still_fits(x, threads, isa)) {
      sequence_ = std::make_unique<Sequence>(x, kept_->given, threads, isa);
    }
  }
  ~Borrowed() {
    const std::lock_guard<std::mutex> lock(keeping);
    std::swap(kept_->idle, sequence_);
  }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  Sequence& operator*() const { return *sequence_; }

 private:
  std::shared_ptr<Kept> kept_;
  std::unique_ptr<Sequence> sequence_;
};

Tensor run_sequence(int64_t number, const Tensor& x, std::vector<int64_t> versions) {
  const Parallel& parallel = torch_parallel();
  const Isa isa = settings().cpu_isa;
  const Borrowed borrowed(number, view_of(x, "x"), parallel.threads, isa);
  Sequence& s = *borrowed;
  STD_TORCH_CHECK(versions.size() == s.steps.size(), "convext_cpu: versions must be one a step");
  const Value& last = s.values.back();
  Tensor y = s.given.flat ? empty_matrix(last.n, last.c, s.input.dtype)
                          : empty_activation(last.n, last.c, last.h, last.w, s.input.dtype, true);

  const int64_t lane = s.lane_bytes + s.own_bytes, lanes = std::max(parallel.threads * lane, s.shared_bytes);
  const ScratchScope scope(s.scratch_bytes() + s.batch_bytes + lanes);
  char* const memory = static_cast<char*>(scratch().take(s.batch_bytes));
  for (Value& v : s.values) v.data = s.whole(v) ? memory + v.offset : nullptr;
  s.values.front().data = static_cast<char*>(s.input.data);
  s.values.back().data = static_cast<char*>(y.mutable_data_ptr());
  char* const lane_memory = static_cast<char*>(scratch().take(lanes));

  for (const Phase& phase : s.parts) {
    std::vector<Lane> memory_of(s.shares(phase) ? 1 : parallel.threads, Lane{nullptr, lane_memory});
    for (size_t t = 0; !s.shares(phase) && t < memory_of.size(); ++t) {
      memory_of[t] = {lane_memory + t * lane, lane_memory + t * lane + s.lane_bytes};
    }
    s.run(phase, memory_of, versions, parallel);
  }
  return y;
}

}  // namespace
}  // namespace convext

STABLE_TORCH_LIBRARY_FRAGMENT(convext_cpu, m) {
  m.def("keep_sequence(int[] program, Tensor[] tensors, float[] eps, bool flat) -> int");
  m.def("drop_sequence(int number) -> ()");
  m.def("run_sequence(int number, Tensor x, int[] versions) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(convext_cpu, CPU, m) {
  m.impl("keep_sequence", TORCH_BOX(&convext::keep_sequence));
  m.impl("run_sequence", TORCH_BOX(&convext::run_sequence));
}

STABLE_TORCH_LIBRARY_IMPL(convext_cpu, CompositeExplicitAutograd, m) {
  m.impl("drop_sequence", TORCH_BOX(&convext::drop_sequence));
}
