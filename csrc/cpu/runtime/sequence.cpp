#include "sequence.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "core/select.h"
#include "cpu/kernels/elementwise/layer_norm.h"
#include "cpu/kernels/elementwise/mean.h"
#include "scratch.h"

namespace convext {

Sequence::Sequence(const View& input, const SequenceProgram& program, const SequenceOperands& operands, int32_t threads,
                   Isa isa)
    : input_(input), threads_(threads), isa_(isa) {
  CONVEXT_CHECK(input.numel() > 0, "a sequence has nothing to do");
  CONVEXT_CHECK(program.steps() > 0 && !program.blocks().back().steps.empty(), "the program has a block without steps");
  values_.push_back({input.size[0], input.size[1], input.size[2], input.size[3]});
  values_[0].image_bytes = input.numel() / input.size[0] * dtype_size(input.dtype);
  values_[0].images = input.size[0];
  for (const ProgramBlock& block : program.blocks()) {
    Value& source = value(block.source);
    source.last_reader = blocks_.size();
    Value out = source;
    const size_t first = steps_.size();
    for (const ProgramStep& step : block.steps) add_step(step, operands, out);
    blocks_.push_back({block.source, first, block.steps.size()});
    values_.push_back(out);
  }
  if (!input.is_dense(Layout::kNHWC)) {
    BlockStep& head = steps_[0];
    CONVEXT_CHECK(blocks_[0].count == 1 && head.variant->layouts == Layouts::kAny && input.is_dense(Layout::kNCHW),
                  "a sequence's input must be dense in a layout that its first kernel reads");
    head.problem.x_layout = Layout::kNCHW;
    for (const ProgramStep* const s : of_program_) {
      CONVEXT_CHECK(s->residual != 0, "a residual must be dense channels-last");
    }
  }
  for (const Block& block : blocks_) {
    if (!runs_in_strips(block)) {
      CONVEXT_CHECK(!steps_[block.first].excites, "a block begins with squeeze and excitation");
    } else if (const char* const why = reject_block(steps_of(block, 0, input.size[0], {}))) {
      fail("the steps cannot run as a block: ", why);
    }
  }
  place_values();
  for (const Phase& phase : phases_) {
    int64_t& bytes = shares(phase) ? shared_bytes_ : own_bytes_;
    bytes = std::max(bytes, workspace(phase, shares(phase) ? threads_ : 1));
  }
}

bool Sequence::still_fits(const View& x, int32_t threads, Isa isa) {
  if (std::memcmp(x.size, input_.size, sizeof x.size) != 0 ||
      std::memcmp(x.stride, input_.stride, sizeof x.stride) != 0 || x.dtype != input_.dtype || threads != threads_ ||
      isa != isa_) {
    return false;
  }
  input_.data = x.data;
  return true;
}

Sequence::Extents Sequence::output() const {
  const Value& last = values_.back();
  return {last.n, last.c, last.h, last.w};
}

Sequence::Value& Sequence::value(int64_t at) {
  CONVEXT_CHECK(at >= 0 && at < static_cast<int64_t>(values_.size()), "the program reads value ", at,
                " before it is there");
  return values_[at];
}

// Adds a step that reads `v`, which becomes its output.
void Sequence::add_step(const ProgramStep& s, const SequenceOperands& operands, Value& v) {
  BlockStep step{};
  View filters{};
  switch (s.kind) {
    case StepKind::kConvolution:
      filters = operands.filters(s);
      step.problem =
          make_problem(v.n, v.c, v.h, v.w, filters.size[0], filters.size[2], filters.size[3], s.geom, input_.dtype);
      CONVEXT_CHECK(
          filters.dtype == input_.dtype || (filters.dtype == DType::kFloat32 && dtype_size(input_.dtype) == 2),
          "x and w must have one dtype");
      CONVEXT_CHECK(filters.size[1] == step.problem.c_per_group(), "w holds ", filters.size[1],
                    " input channels a group, x ", step.problem.c_per_group());
      add_convolution(s, operands, v, step);
      break;
    case StepKind::kLayerNorm:
      step.problem = make_problem(v.n, v.c, v.h, v.w, v.c, 1, 1, {1, 1, 0, 0, 1, 1, 1}, input_.dtype);
      step.variant = layer_norm_for(isa_, input_.dtype);
      break;
    case StepKind::kMean:
      step.problem =
          make_problem(v.n, v.c, v.h, v.w, v.c, v.h, v.w, {1, 1, 0, 0, 1, 1, static_cast<int32_t>(v.c)}, input_.dtype);
      step.variant = mean_for(isa_, input_.dtype);
      break;
  }
  const ConvProblem& p = step.problem;
  CONVEXT_CHECK(step.variant != nullptr, "a layer that is no convolution has no kernel for this dtype");
  CONVEXT_CHECK(p.y_size() > 0 && p.x_size() > 0, "a step has nothing to do");
  steps_.push_back(step);
  of_program_.push_back(&s);
  filters_.push_back(filters);
  v = {v.n, p.k, p.p(), p.q()};
  v.image_bytes = p.y_size() / v.n * dtype_size(input_.dtype);
}

void Sequence::add_convolution(const ProgramStep& s, const SequenceOperands& operands, const Value& v,
                               BlockStep& step) {
  const ConvProblem& p = step.problem;
  const auto& all = variants();
  CONVEXT_CHECK(s.variant >= 0 && s.variant < static_cast<int64_t>(all.size()), "there is no variant ", s.variant);
  step.variant = all[s.variant];
  const char* const why = reject(*step.variant, Device::kCPU, Pass::kFprop, p);
  CONVEXT_CHECK(why == nullptr, step.variant->name, " rejects the problem: ", why);
  CONVEXT_CHECK(!step.variant->is_staged(p), step.variant->name, " reads another dtype");
  step.epilogue.activation = s.activation;
  if (s.residual != kAbsent) {
    Value& residual = value(s.residual);
    CONVEXT_CHECK(residual.n == v.n && residual.c == p.k && residual.h == p.p() && residual.w == p.q(),
                  "a residual must have its step's shape");
    residual.last_reader = blocks_.size();
  }
  step.excites = s.excites;
  if (s.excites) step.excite = operands.excite(s, v.c);
}

// What a block moves, for the choice of phases.
LayerBytes Sequence::bytes_of(size_t b) const {
  const Block& block = blocks_[b];
  const int64_t output = values_[b + 1].image_bytes;
  LayerBytes moved{0, values_[block.source].image_bytes + output, output};
  for (size_t i = block.first; i < block.first + block.count; ++i) {
    const Variant& variant = *steps_[i].variant;
    const ConvProblem& p = steps_[i].problem;
    const int64_t size = dtype_size(p.dtype);
    switch (of_program_[i]->kind) {
      case StepKind::kConvolution: {
        const bool packs = variant.pack_format != nullptr && variant.pack_format(p) != nullptr;
        moved.weights += packs ? variant.packed_size(p) : p.w_size() * size;
        break;
      }
      case StepKind::kLayerNorm: moved.weights += 2 * p.c * size; break;
      case StepKind::kMean: break;
    }
    const int64_t residual = of_program_[i]->residual;
    if (residual != kAbsent) moved.image += values_[residual].image_bytes;
  }
  return moved;
}

// Chooses the phases and places every value but the first and the last: at the lowest address that is free while it
// lives, in the memory of the whole batch or in that of a thread.
void Sequence::place_values() {
  std::vector<LayerBytes> layers;
  for (size_t b = 0; b < blocks_.size(); ++b) layers.push_back(bytes_of(b));
  phases_ = phases(layers, input_.size[0], threads_, 2 * block_cache_budget());
  for (const Phase& phase : phases_) {
    for (int64_t b = phase.first; b < phase.first + phase.count; ++b) {
      Value& v = values_[b + 1];
      const bool crosses = static_cast<int64_t>(v.last_reader) >= phase.first + phase.count;
      v.images = crosses || b + 2 == static_cast<int64_t>(values_.size()) ? v.n : phase.images;
      // While a phase runs, other images may still need what this one has read for the last time.
      if (b + 2 < static_cast<int64_t>(values_.size())) place(b + 1, whole(v) && !shares(phase) ? phase.first : b);
    }
  }
}

// Places value i beside those of its memory that block `from` or a later one reads.
void Sequence::place(size_t i, size_t from) {
  Value& v = values_[i];
  const auto end = [](const Value& value) { return value.offset + Scratch::padded(value.images * value.image_bytes); };
  std::vector<const Value*> alive;
  for (size_t j = 1; j < i; ++j) {
    if (values_[j].last_reader >= from && whole(values_[j]) == whole(v)) alive.push_back(&values_[j]);
  }
  std::sort(alive.begin(), alive.end(), [](const Value* a, const Value* b) { return a->offset < b->offset; });
  for (const Value* other : alive) {
    if (end(v) <= other->offset) break;
    v.offset = std::max(v.offset, end(*other));
  }
  int64_t& top = whole(v) ? batch_bytes_ : lane_bytes_;
  top = std::max(top, end(v));
}

// Where a value lies from an image on.
char* Sequence::at(const Value& v, int64_t image, const Lane& lane) const {
  return whole(v) ? v.data + image * v.image_bytes : lane.values + v.offset;
}

// The steps of a block for some of the images.
std::vector<BlockStep> Sequence::steps_of(const Block& block, int64_t image, int64_t count, const Lane& lane) const {
  std::vector<BlockStep> some(steps_.begin() + block.first, steps_.begin() + block.first + block.count);
  for (size_t i = 0; i < block.count; ++i) {
    some[i].problem.n = static_cast<int32_t>(count);
    const int64_t residual = of_program_[block.first + i]->residual;
    if (residual != kAbsent) some[i].epilogue.residual = at(values_[residual], image, lane);
  }
  return some;
}

int64_t Sequence::workspace(const Phase& phase, int32_t sharing) const {
  int64_t most = 0;
  for (int64_t b = phase.first; b < phase.first + phase.count; ++b) {
    const std::vector<BlockStep> some = steps_of(blocks_[b], 0, phase.images, {});
    const auto needed = some[0].variant->workspace;
    most = std::max(most, runs_in_strips(blocks_[b]) ? block_workspace(some, sharing)
                          : needed != nullptr        ? needed(some[0].problem, sharing)
                                                     : 0);
  }
  return Scratch::padded(most);
}

// Runs a block for some of the images. Returns nullptr, or what went wrong in words.
const char* Sequence::run_images(int64_t b, int64_t image, int64_t count, const Lane& lane,
                                 const Parallel& parallel) const {
  const Block& block = blocks_[b];
  const std::vector<BlockStep> some = steps_of(block, image, count, lane);
  const char* const in = at(values_[block.source], image, lane);
  char* const out = at(values_[b + 1], image, lane);
  if (runs_in_strips(block)) {
    return run_block(some, in, out, lane.workspace, squeeze_excite_for(isa_), parallel);
  }
  LaunchArgs args{};
  args.a = in;
  args.b = some[0].weights;
  args.weights = some[0].source;
  args.out = out;
  args.epilogue = some[0].epilogue;
  args.workspace = lane.workspace;
  args.parallel = &parallel;
  return some[0].variant->launch(some[0].problem, args);
}

void Sequence::prepare(int64_t b, SequenceOperands& operands, const Parallel& parallel) {
  for (size_t i = blocks_[b].first; i < blocks_[b].first + blocks_[b].count; ++i) {
    operands.prepare(i, *of_program_[i], filters_[i], parallel, steps_[i]);
  }
}

void Sequence::prefetch(int64_t b, const SequenceOperands& operands) const {
  for (size_t i = blocks_[b].first; i < blocks_[b].first + blocks_[b].count; ++i) {
    operands.prefetch(i, *of_program_[i]);
  }
}

// Runs a phase; `lanes`: memory for each thread, the first one's for all threads together.
void Sequence::run_phase(const Phase& phase, const std::vector<Lane>& lanes, SequenceOperands& operands,
                         const Parallel& parallel) {
  const int64_t end = phase.first + phase.count;
  std::atomic<const char*> failure{nullptr};
  if (shares(phase)) {
    for (int64_t b = phase.first; b < end; ++b) {
      prepare(b, operands, parallel);
      // While a block runs, what the next one's epilogue is made of comes from memory.
      if (b + 1 < static_cast<int64_t>(blocks_.size())) prefetch(b + 1, operands);
      if (const char* const why = run_images(b, 0, input_.size[0], lanes[0], parallel)) failure = why;
    }
  } else {
    prefetch(phase.first, operands);
    for (int64_t b = phase.first; b < end; ++b) {
      if (b + 1 < end) prefetch(b + 1, operands);
      prepare(b, operands, parallel);
    }
    const int64_t each = input_.size[0] / threads_;
    parallel.for_each(threads_, [&](int64_t t) {
      for (int64_t image = t * each; image < (t + 1) * each; image += phase.images) {
        for (int64_t b = phase.first; b < end; ++b) {
          if (const char* const why = run_images(b, image, phase.images, lanes[t], {nullptr, 1})) failure = why;
        }
      }
    });
  }
  CONVEXT_CHECK(failure == nullptr, "a step of a sequence failed: ", failure.load());
}

int64_t Sequence::memory_bytes() const {
  return batch_bytes_ + std::max(threads_ * (lane_bytes_ + own_bytes_), shared_bytes_);
}

void Sequence::run(void* output, void* memory, SequenceOperands& operands, const Parallel& parallel) {
  char* const batch_memory = static_cast<char*>(memory);
  for (Value& v : values_) v.data = whole(v) ? batch_memory + v.offset : nullptr;
  values_.front().data = static_cast<char*>(input_.data);
  values_.back().data = static_cast<char*>(output);
  char* const lane_memory = batch_memory + batch_bytes_;
  const int64_t lane = lane_bytes_ + own_bytes_;
  for (const Phase& phase : phases_) {
    std::vector<Lane> lanes(shares(phase) ? 1 : threads_, Lane{nullptr, lane_memory});
    for (size_t t = 0; !shares(phase) && t < lanes.size(); ++t) {
      lanes[t] = {lane_memory + t * lane, lane_memory + t * lane + lane_bytes_};
    }
    run_phase(phase, lanes, operands, parallel);
  }
}

}  // namespace convext
