// A sequence for inputs of one shape: what its values are, where they lie, what its steps want of memory, and how they
// run. Between blocks nothing but kernels runs, and what lies between them is scratch memory, which stays warm from
// call to call.
//
// A batch goes through the sequence in phases (phases.h): in some each thread takes images of its own through many
// blocks, in others all threads share each block. Values that one phase makes and another reads hold the whole batch.
#pragma once
#include "block.h"
#include "phases.h"
#include "sequence_program.h"

namespace convext {

// The steps' tensors: the caller has them, and knows their type. Where they lie, and their extents, is a sequence's for
// good; what they hold is read anew in each run.
class SequenceOperands {
 public:
  virtual ~SequenceOperands() = default;
  // The weight of a convolution as a filter bank.
  virtual View filters(const ProgramStep& step) const = 0;
  // The squeeze and excitation in front of a convolution, of c channels.
  virtual Excite excite(const ProgramStep& step, int64_t c) const = 0;
  // Sets the weights, their source and the epilogue of step `index` as its kernel takes them, for the length of a run.
  virtual void prepare(int64_t index, const ProgramStep& step, const View& filters, const Parallel&,
                       BlockStep& out) = 0;
  // Asks for what `prepare` is going to look at, so that its waits for memory overlap.
  virtual void prefetch(int64_t index, const ProgramStep& step) const = 0;
};

class Sequence {
 public:
  // Everything that follows from extents alone. Throws std::runtime_error where the steps do not fit together.
  Sequence(const View& input, const SequenceProgram& program, const SequenceOperands& operands, int32_t threads,
           Isa isa);

  // Whether all this holds for a run: the same input but for its address, which becomes that of the next run.
  bool still_fits(const View& input, int32_t threads, Isa isa);

  // Of the result, which is dense channels-last.
  struct Extents {
    int64_t n, c, h, w;
  };
  Extents output() const;

  const std::vector<BlockStep>& steps() const { return steps_; }
  const std::vector<const ProgramStep*>& program_steps() const { return of_program_; }
  const std::vector<View>& filters() const { return filters_; }  // of each step; empty where it has none

  // Bytes that `run` wants beside what the operands' `prepare` takes.
  int64_t memory_bytes() const;
  void run(void* output, void* memory, SequenceOperands& operands, const Parallel& parallel);

 private:
  // An activation between two blocks: who reads it last, and where it lies.
  struct Value {
    int64_t n = 0, c = 0, h = 0, w = 0;
    int64_t image_bytes = 0;
    size_t last_reader = 0;
    int64_t images = 0;    // that it holds: the whole batch, or those that go together through the phase that makes it
    int64_t offset = 0;    // in the memory of the whole batch's values, or in a thread's own
    char* data = nullptr;  // of the whole batch; nullptr for a thread's own
  };
  struct Block {
    int64_t source;
    size_t first, count;  // of the steps
  };
  // A thread's memory in a phase: its own values and workspace.
  struct Lane {
    char *values, *workspace;
  };

  Value& value(int64_t at);
  void add_step(const ProgramStep& s, const SequenceOperands& operands, Value& v);
  void add_convolution(const ProgramStep& s, const SequenceOperands& operands, const Value& v, BlockStep& step);
  LayerBytes bytes_of(size_t b) const;
  void place_values();
  void place(size_t i, size_t from);
  char* at(const Value& v, int64_t image, const Lane& lane) const;
  std::vector<BlockStep> steps_of(const Block& block, int64_t image, int64_t count, const Lane& lane) const;
  int64_t workspace(const Phase& phase, int32_t sharing) const;
  const char* run_images(int64_t b, int64_t image, int64_t count, const Lane& lane, const Parallel& parallel) const;
  void prepare(int64_t b, SequenceOperands& operands, const Parallel& parallel);
  void prefetch(int64_t b, const SequenceOperands& operands) const;
  void run_phase(const Phase& phase, const std::vector<Lane>& lanes, SequenceOperands& operands, const Parallel&);

  static bool whole(const Value& v) { return v.images == v.n; }
  static bool runs_in_strips(const Block& block) { return block.count > 1; }
  bool shares(const Phase& phase) const { return phase.images == input_.size[0]; }

  View input_;
  int32_t threads_;
  Isa isa_;
  std::vector<Block> blocks_;
  std::vector<BlockStep> steps_;
  std::vector<const ProgramStep*> of_program_;
  std::vector<View> filters_;
  std::vector<Value> values_;
  std::vector<Phase> phases_;
  int64_t batch_bytes_ = 0, lane_bytes_ = 0;  // of the values, in the memory of the whole batch and in that of a thread
  int64_t shared_bytes_ = 0, own_bytes_ = 0;  // of workspace, for all threads together and for each
};

}  // namespace convext
