// Several convolutions in one call, from a tensor to a tensor. The ops are private to convext;
// convext/backends/native.py calls them.
//
// The program (cpu/runtime/sequence_program.h), the tensors and packed weights that it numbers and eps, one for each
// step, are handed over once, and cached under a number: to pass hundreds of tensors took longer than some layers do.
// Cached are addresses and extents, not the tensors, which torch could not exchange then (torch.utils.swap_tensors);
// the caller checks before each call that they still are the tensors' (native_sequence.py). A call brings the input
// and the version counters of the weights. The values in tensors are read anew in each call; what follows from extents
// alone (cpu/runtime/sequence.h) is cached, and worked out again where the input's extents or order, the threads or the
// instruction set differ.
#include <memory>
#include <mutex>
#include <unordered_map>

#include "conv_call.h"
#include "cpu/runtime/sequence.h"

namespace convext {
namespace {

// What is handed over once, and the Sequence of a call that is over, for the next one.
struct CachedSequence {
  std::shared_ptr<const SequenceProgram> program;
  std::vector<std::optional<HeldTensor>> tensors;
  std::vector<std::shared_ptr<PackedWeight>> packed;
  std::vector<double> eps;
  bool flat;  // the result is (N, C), which its one pixel is
  std::unique_ptr<Sequence> idle;
};

class Operands : public SequenceOperands {
 public:
  Operands(const CachedSequence& cached, const std::vector<int64_t>& versions)
      : cached_(cached), versions_(versions), staging_(staging_for(settings().cpu_isa)) {
    weights_.reserve(versions.size());
    leases_.reserve(versions.size());
  }

  View filters(const ProgramStep& step) const override {
    const HeldTensor& w = *tensor(step.weight);
    if (w.dim() == 4) return view_of(w, "w");
    STD_TORCH_CHECK(w.is_cpu() && w.dim() == 2, "convext_cpu: w must be a CPU tensor of 4 or 2 dimensions");
    return {{w.size(0), w.size(1), 1, 1}, {w.stride(0), w.stride(1), 1, 1}, dtype_of(w), w.data_ptr()};
  }

  Excite excite(const ProgramStep& step, int64_t c) const override {
    const HeldTensor& squeeze = *tensor(step.squeeze_weight);
    STD_TORCH_CHECK(squeeze.dim() == 4 && squeeze.size(1) == c, "convext_cpu: squeeze and excitation must read ", c,
                    " channels");
    const int64_t squeezed = squeeze.size(0);
    const auto operand = [&](int64_t at, int64_t numel) -> const float* {
      const std::optional<HeldTensor>& t = tensor(at);
      if (!t) return nullptr;
      STD_TORCH_CHECK(t->is_cpu() && dtype_of(*t) == DType::kFloat32 && t->numel() == numel && t->is_contiguous(),
                      "convext_cpu: squeeze and excitation takes contiguous float32 tensors of ", numel,
                      " values here");
      return static_cast<const float*>(t->const_data_ptr());
    };
    Excite excite{operand(step.squeeze_weight, squeezed * c), operand(step.squeeze_bias, squeezed),
                  operand(step.excite_weight, squeezed * c), operand(step.excite_bias, c)};
    excite.c = static_cast<int32_t>(c), excite.squeezed = static_cast<int32_t>(squeezed);
    excite.activation = step.squeeze_activation;
    excite.gate = step.gate;
    return excite;
  }

  void prepare(int64_t index, const ProgramStep& step, const View& filters, const Parallel& parallel,
               BlockStep& out) override {
    if (out.problem.accumulate_dtype() == DType::kFloat64) {
      norm_of(index, step).fold<double>(out.problem.k, out.epilogue);
    } else {
      norm_of(index, step).fold<float>(out.problem.k, out.epilogue);
    }
    if (step.kind == StepKind::kLayerNorm) out.weights = &cached_.eps[index];
    if (step.kind == StepKind::kConvolution) {
      weights_.push_back(weights_of(step, out, filters, versions_[index]));
      out.weights = weights_.back().get(staging_, parallel, leases_.emplace_back());
      out.source = weights_.back().source();
    }
  }

  void prefetch(int64_t index, const ProgramStep& step) const override { norm_of(index, step).read_ahead(); }

  // What `prepare` takes of the scratch memory for all steps.
  int64_t scratch_bytes(const Sequence& s) const {
    int64_t bytes = 0;
    for (size_t i = 0; i < s.steps().size(); ++i) {
      const BlockStep& of = s.steps()[i];
      const ProgramStep& step = *s.program_steps()[i];
      bytes += norm_of(i, step).scratch_bytes(of.problem.k, of.problem.accumulate_dtype());
      if (step.kind == StepKind::kConvolution) bytes += weights_of(step, of, s.filters()[i], 0).scratch_bytes();
    }
    return bytes;
  }

 private:
  const std::optional<HeldTensor>& tensor(int64_t at) const {
    static const std::optional<HeldTensor> absent;
    return at == kAbsent ? absent : cached_.tensors[at];
  }
  BatchNormTensors<std::optional<HeldTensor>> norm_of(int64_t index, const ProgramStep& step) const {
    return {tensor(step.bias),  tensor(step.mean), tensor(step.var),
            tensor(step.gamma), tensor(step.beta), cached_.eps[index]};
  }
  Weights weights_of(const ProgramStep& step, const BlockStep& of, const View& filters, int64_t version) const {
    PackedWeight* const packed = step.packed == kAbsent ? nullptr : cached_.packed[step.packed].get();
    return {*of.variant, of.problem, filters, packed, version};
  }

  const CachedSequence& cached_;
  const std::vector<int64_t>& versions_;  // of each step's weight
  const Staging& staging_;
  std::vector<Weights> weights_;  // of the steps that are prepared: their sources point here
  std::vector<PackedWeight::Lease> leases_;
};

std::mutex keeping;

std::unordered_map<int64_t, std::shared_ptr<CachedSequence>>& cached_sequences() {
  // It outlives every caller.
  static auto* const cached = new std::unordered_map<int64_t, std::shared_ptr<CachedSequence>>;
  return *cached;
}

int64_t keep_sequence(int64_t number, std::vector<Tensor> tensors, std::vector<int64_t> packed, std::vector<double> eps,
                      bool flat) {
  static int64_t last = 0;
  const std::shared_ptr<const SequenceProgram> program = SequenceProgram::find(number);
  STD_TORCH_CHECK(program != nullptr, "convext_cpu: there is no program ", number);
  STD_TORCH_CHECK(static_cast<int64_t>(tensors.size()) == program->tensors() &&
                      static_cast<int64_t>(packed.size()) == program->packed(),
                  "convext_cpu: the program has ", program->tensors(), " tensors and ", program->packed(),
                  " packed weights, got ", tensors.size(), " and ", packed.size());
  STD_TORCH_CHECK(static_cast<int64_t>(eps.size()) == program->steps(), "convext_cpu: eps must be one a step");
  auto cached = std::make_shared<CachedSequence>(CachedSequence{program, {}, {}, std::move(eps), flat, nullptr});
  for (const Tensor& t : tensors) cached->tensors.emplace_back(HeldTensor(t));
  for (int64_t weight : packed) cached->packed.push_back(packed_weight(weight));
  const std::lock_guard<std::mutex> lock(keeping);
  cached_sequences().emplace(++last, std::move(cached));
  return last;
}

void drop_sequence(int64_t number) {
  std::shared_ptr<CachedSequence> dropped;  // what it held is freed outside the lock
  const std::lock_guard<std::mutex> lock(keeping);
  const auto found = cached_sequences().find(number);
  if (found == cached_sequences().end()) return;
  dropped = std::move(found->second);
  cached_sequences().erase(found);
}

// What is cached under a number, and a Sequence for the length of a call. Calls in several threads at once have one
// each; the next call takes over one of them.
class Borrowed {
 public:
  explicit Borrowed(int64_t number) {
    const std::lock_guard<std::mutex> lock(keeping);
    const auto found = cached_sequences().find(number);
    STD_TORCH_CHECK(found != cached_sequences().end(), "convext_cpu: there is no sequence ", number);
    cached_ = found->second;
    sequence_ = std::move(cached_->idle);
  }
  ~Borrowed() {
    const std::lock_guard<std::mutex> lock(keeping);
    std::swap(cached_->idle, sequence_);
  }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;

  const CachedSequence& cached() const { return *cached_; }
  Sequence& sequence_for(const View& x, const Operands& operands, int32_t threads) {
    const Isa isa = settings().cpu_isa;
    if (sequence_ == nullptr || !sequence_->still_fits(x, threads, isa)) {
      sequence_ = std::make_unique<Sequence>(x, *cached_->program, operands, threads, isa);
    }
    return *sequence_;
  }

 private:
  std::shared_ptr<CachedSequence> cached_;
  std::unique_ptr<Sequence> sequence_;
};

Tensor run_sequence(int64_t number, const Tensor& x, std::vector<int64_t> versions) {
  const Parallel& parallel = torch_parallel();
  Borrowed borrowed(number);
  const CachedSequence& cached = borrowed.cached();
  STD_TORCH_CHECK(versions.size() == cached.eps.size(), "convext_cpu: versions must be one a step");
  Operands operands(cached, versions);
  const View input = view_of(x, "x");
  Sequence& s = borrowed.sequence_for(input, operands, parallel.threads);
  const Sequence::Extents last = s.output();
  STD_TORCH_CHECK(!cached.flat || (last.h == 1 && last.w == 1), "convext_cpu: the result has more than one pixel");
  Tensor y = cached.flat ? empty_matrix(last.n, last.c, input.dtype)
                         : empty_activation(last.n, last.c, last.h, last.w, input.dtype, true);
  const ScratchScope scope(operands.scratch_bytes(s) + Scratch::padded(s.memory_bytes()));
  void* const memory = scratch().take(s.memory_bytes());
  s.run(y.mutable_data_ptr(), memory, operands, parallel);
  return y;
}

}  // namespace
}  // namespace convext

STABLE_TORCH_LIBRARY_FRAGMENT(convext_cpu, m) {
  m.def("keep_sequence(int program, Tensor[] tensors, int[] packed, float[] eps, bool flat) -> int");
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
