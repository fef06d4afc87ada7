// Stand-alone test of sequences (cpu/runtime/sequence.h): bit for bit what their steps give one by one, for batches
// that go through in phases of their own, and what a program or a sequence refuses. No torch. Exits non-zero on
// failure.
#include "cpu/runtime/sequence.h"

#include <functional>

#include "core/select.h"
#include "cpu/runtime/scratch.h"
#include "harness.h"

namespace {

using namespace convext;
using namespace convext::testing;

View channels_last(int64_t n, int64_t c, int64_t h, int64_t w, const float* data) {
  return {{n, c, h, w}, {h * w * c, 1, w * c, c}, DType::kFloat32, const_cast<float*>(data)};
}

// Plain arrays for tensors: filters (K, C, R, S), and K values for everything else.
struct Arrays : SequenceOperands {
  struct Array {
    std::vector<float> values;
    View view;
  };
  std::vector<Array> arrays;
  std::vector<std::unique_ptr<Buffer>> packed;
  const double eps = 1e-5;

  void add(int64_t k, int64_t c = 1, int64_t r = 1) {
    arrays.push_back({random_values(k * c * r * r), {{k, c, r, r}, {c * r * r, r * r, r, 1}, DType::kFloat32, {}}});
    arrays.back().view.data = arrays.back().values.data();
  }
  const float* values(int64_t at) const { return at == kAbsent ? nullptr : arrays[at].values.data(); }

  View filters(const ProgramStep& s) const override { return arrays[s.weight].view; }
  Excite excite(const ProgramStep&, int64_t) const override { return {}; }
  void prefetch(int64_t, const ProgramStep&) const override {}
  void prepare(int64_t, const ProgramStep& s, const View& filters, const Parallel& parallel, BlockStep& out) override {
    out.epilogue.scale = values(s.gamma);
    out.epilogue.shift = values(s.kind == StepKind::kLayerNorm ? s.beta : s.bias);
    out.weights = s.kind == StepKind::kLayerNorm ? static_cast<const void*>(&eps) : filters.data;
    if (s.kind == StepKind::kConvolution) {
      out.source = {[](const void* dense, const Parallel&, void*) { return dense; }, filters.data};
    }
    const Variant& v = *out.variant;
    if (s.kind != StepKind::kConvolution || v.pack_format == nullptr || v.pack_format(out.problem) == nullptr) return;
    packed.push_back(std::make_unique<Buffer>(v.packed_size(out.problem)));
    v.pack(out.problem, filters.data, packed.back()->data.get(), parallel);
    out.weights = packed.back()->data.get();
  }
};

struct Made {
  std::shared_ptr<SequenceProgram> program = SequenceProgram::make();
  Arrays arrays;

  void convolution(int64_t n, int64_t c, int64_t size, int64_t k, int64_t r, int64_t groups,
                   std::optional<int64_t> residual = {}) {
    const std::vector<int64_t> geom = {1, 1, r / 2, r / 2, 1, 1, groups};
    const ConvProblem p = make_problem(n, c, size, size, k, r, r, geom_of(geom), DType::kFloat32);
    const int variant = select(Device::kCPU, Pass::kFprop, p);
    program->add_convolution(variant, geom, static_cast<int64_t>(Activation::relu), false, residual,
                             {true, false, false, false, false}, {});
    arrays.add(k, c / groups, r);
    arrays.add(k);
  }
};

// 3x3, then a block of depthwise, layer norm and two 1x1 with the 3x3's output as residual, then 3x3 and the mean.
Made network(int64_t n, int64_t size) {
  Made m;
  m.program->begin_block(0);
  m.convolution(n, 8, size, 32, 3, 1);
  m.program->begin_block(1);
  m.convolution(n, 32, size, 32, 5, 32);
  m.program->add_layer_norm(true, true);
  m.arrays.add(32), m.arrays.add(32);
  m.convolution(n, 32, size, 72, 1, 1);
  m.convolution(n, 72, size, 32, 1, 1, 1);
  m.program->begin_block(2);
  m.convolution(n, 32, size, 40, 3, 1);  // Winograd's, where it is large
  m.program->begin_block(3);
  m.program->add_mean();
  return m;
}

std::vector<float> run(Sequence& s, Arrays& arrays, int threads) {
  const Sequence::Extents out = s.output();
  std::vector<float> y(out.n * out.c * out.h * out.w);
  Buffer memory(s.memory_bytes());
  s.run(y.data(), memory.data.get(), arrays, parallel_with(threads));
  return y;
}

// The same, every step a launch of its own.
std::vector<float> one_by_one(const Sequence& s, const SequenceProgram& program, Arrays& arrays,
                              const std::vector<float>& input) {
  std::vector<std::vector<float>> values = {input};
  size_t index = 0;
  for (const ProgramBlock& block : program.blocks()) {
    std::vector<float> x = values[block.source];
    for (const ProgramStep& of : block.steps) {
      BlockStep step = s.steps()[index];
      arrays.prepare(index, of, s.filters()[index], kSerial, step);
      ++index;
      std::vector<float> y(step.problem.y_size());
      Buffer workspace(step.variant->workspace ? step.variant->workspace(step.problem, 1) : 0);
      LaunchArgs args{};
      args.a = x.data(), args.b = step.weights, args.out = y.data(), args.parallel = &kSerial;
      args.weights = step.source, args.epilogue = step.epilogue, args.workspace = workspace.data.get();
      if (of.residual != kAbsent) args.epilogue.residual = values[of.residual].data();
      check(step.variant->launch(step.problem, args) == nullptr, step.variant->name);
      x = y;
    }
    values.push_back(x);
  }
  return values.back();
}

void test_network(int64_t n, int64_t size, const std::string& isa) {
  Made m = network(n, size);
  const std::vector<float> x = random_values(n * 8 * size * size), other = random_values(x.size());
  for (int threads : {1, 2, 3}) {
    const std::string what = isa + ", batch " + std::to_string(n) + ", size " + std::to_string(size) + ", " +
                             std::to_string(threads) + " threads";
    const View view = channels_last(n, 8, size, size, x.data());
    const Isa set = settings().cpu_isa;
    Sequence s(view, *m.program, m.arrays, threads, set);
    check(s.output().n == n && s.output().c == 40 && s.output().h == 1 && s.output().w == 1, what + ": extents");
    check(run(s, m.arrays, threads) == one_by_one(s, *m.program, m.arrays, x), what);
    const View moved = channels_last(n, 8, size, size, other.data());
    check(s.still_fits(moved, threads, set), what + ": another input of the same shape");
    check(run(s, m.arrays, threads) == one_by_one(s, *m.program, m.arrays, other), what + ": another input");
    check(!s.still_fits(channels_last(n, 8, size, size + 1, x.data()), threads, set), what + ": a wider one");
    check(!s.still_fits(view, threads + 1, set), what + ": more threads");
  }
}

void refuses(const std::string& words, const std::function<void()>& f) {
  std::string said;
  try {
    f();
  } catch (const std::runtime_error& error) {
    said = error.what();
  }
  check(said.rfind("convext_cpu: ", 0) == 0 && said.find(words) != std::string::npos, words + ", not: " + said);
}

void test_refusals() {
  const auto sequence = [](const Made& m, int64_t n, int64_t c, int64_t size) {
    static const std::vector<float> x(1 << 16);
    Sequence(channels_last(n, c, size, size, x.data()), *m.program, m.arrays, 1, settings().cpu_isa);
  };
  const auto start = [](Made& m) { m.program->begin_block(0), m.convolution(1, 8, 9, 16, 3, 1); };
  const auto refuses_made = [](const std::string& words, const std::function<void(Made&)>& f) {
    refuses(words, [&] {
      Made m;
      f(m);
    });
  };
  refuses("without a block", [] { SequenceProgram::make()->add_mean(); });
  refuses_made("a block without steps", [&](Made& m) {
    m.program->begin_block(0);
    m.program->begin_block(0);
  });
  refuses("a block without steps", [&] { sequence(Made(), 1, 8, 9); });
  refuses_made("reads value 2 before it is there", [&](Made& m) {
    start(m);
    m.program->begin_block(2);
  });
  refuses_made("reads value 1 before it is there", [&](Made& m) {
    m.program->begin_block(0);
    m.convolution(1, 8, 9, 8, 3, 1, 1);
  });
  refuses("4 places", [] {
    const auto program = SequenceProgram::make();
    program->begin_block(0);
    program->add_convolution(0, {1, 1, 0, 0, 1, 1, 1}, 0, false, {}, {true, true, true, true}, {});
  });
  refuses("must be 7 or 10 numbers", [] {
    const auto program = SequenceProgram::make();
    program->begin_block(0);
    program->add_convolution(0, {1, 1}, 0, false, {}, {true, false, false, false, false}, {});
  });
  refuses_made("there is no variant 1000000", [&](Made& m) {
    m.program->begin_block(0);
    m.program->add_convolution(1000000, {1, 1, 0, 0, 1, 1, 1}, 0, false, {}, {false, false, false, false, false}, {});
    m.arrays.add(4, 8);
    sequence(m, 1, 8, 9);
  });
  refuses_made("w holds 8 input channels a group, x 4", [&](Made& m) {
    start(m);
    sequence(m, 1, 4, 9);
  });
  refuses_made("must have its step's shape", [&](Made& m) {
    m.program->begin_block(0);
    m.convolution(1, 8, 9, 16, 3, 1, 0);
    sequence(m, 1, 8, 9);
  });
  refuses_made("cannot run as a block: ", [&](Made& m) {
    start(m);
    m.convolution(1, 16, 9, 16, 3, 1);
    sequence(m, 1, 8, 9);
  });
  refuses_made("nothing to do", [&](Made& m) {
    start(m);
    sequence(m, 0, 8, 9);
  });
  refuses_made("in use", [&](Made& m) {
    start(m);
    check(SequenceProgram::find(m.program->number()) == m.program, "a program is known under its number");
    m.program->add_mean();
  });
  const int64_t number = Made().program->number();
  check(SequenceProgram::find(number) == nullptr, "a program that is gone is not found");
}

}  // namespace

int main() {
  for (const auto& [isa, name] : instruction_sets(detect_cpu_isa())) {
    settings().cpu_isa = isa;
    test_network(1, 13, name);
    test_network(6, 10, name);
    test_network(6, 96, name);  // large images: some go through alone, in each thread
  }
  test_refusals();
  return summary();
}
