// Stand-alone test of blocks (block.h): bit for bit what their steps give one by one, on every instruction set that
// this CPU has, for any number of threads and any size of strip; squeeze and excitation, and the mean over pixels,
// against plain loops; and what images go together (phases.h). No torch.
// Exits non-zero on failure.
#include "cpu/runtime/block.h"

#include <cmath>
#include <string>

#include "core/select.h"
#include "cpu/kernels/elementwise/layer_norm.h"
#include "cpu/kernels/elementwise/mean.h"
#include "cpu/runtime/phases.h"
#include "harness.h"

namespace {

using namespace convext;
using namespace convext::testing;

// A layer of a block: channels out, filter, stride; 0 channels for a depthwise one, and no filter for a LayerNorm.
struct Layer {
  int k, r, stride, dilation = 1;
  bool excites = false, residual = false, input_as_residual = false;
};

struct Case {
  const char* name;
  int n, c, h, w;
  std::vector<Layer> layers;
};

std::vector<Case> cases() {
  return {
      {"inverted_residual", 2, 16, 14, 14, {{96, 1, 1}, {0, 3, 1}, {16, 1, 1, 1, false, false, true}}},
      {"inverted_residual_stride_2", 1, 24, 15, 17, {{70, 1, 1}, {0, 3, 2}, {33, 1, 1}}},
      {"even_extents_stride_2", 3, 8, 16, 12, {{40, 1, 1}, {0, 5, 2}, {24, 1, 1}}},
      {"depthwise_first", 1, 32, 23, 9, {{0, 3, 1}, {16, 1, 1}}},
      {"depthwise_first_stride_2", 2, 20, 22, 22, {{0, 5, 2}, {16, 1, 1, 1, false, true}}},
      {"ends_with_depthwise", 1, 12, 19, 8, {{48, 1, 1}, {0, 7, 1}}},
      {"two_depthwise", 1, 17, 21, 13, {{0, 3, 2}, {30, 1, 1}, {0, 5, 1}, {8, 1, 1}}},
      {"dilated", 1, 16, 18, 18, {{32, 1, 1}, {0, 3, 1, 3}, {16, 1, 1}}},
      {"filter_larger_than_image", 5, 64, 3, 3, {{64, 1, 1}, {0, 7, 1}, {32, 1, 1}}},
      {"one_row", 1, 8, 1, 9, {{16, 1, 1}, {0, 3, 1}, {8, 1, 1}}},
      {"excited", 2, 16, 14, 14, {{72, 1, 1}, {0, 5, 1}, {16, 1, 1, 1, true, false, true}}},
      {"excited_stride_2", 3, 24, 13, 11, {{100, 1, 1}, {0, 3, 2}, {40, 1, 1, 1, true}}},
      {"excited_without_expansion", 1, 32, 20, 20, {{0, 3, 1}, {16, 1, 1, 1, true}}},
      {"layer_norm", 2, 24, 14, 15, {{0, 7, 1}, {0, 0, 1}, {96, 1, 1}, {24, 1, 1, 1, false, false, true}}},
      {"layer_norm_first", 1, 37, 19, 8, {{0, 0, 1}, {0, 3, 2}, {20, 1, 1}}},
      {"layer_norm_excited", 3, 16, 12, 12, {{48, 1, 1}, {0, 0, 1}, {16, 1, 1, 1, true}, {0, 0, 1}}},
      {"layer_norm_weights_beyond_the_cache", 2, 40, 9, 9, {{0, 7, 1}, {0, 0, 1}, {640, 1, 1}, {40, 1, 1}}},
      {"pointwise_twice", 4, 33, 7, 7, {{65, 1, 1}, {16, 1, 1}}},
      {"few_rows_of_many_channels", 1, 64, 4, 8, {{1024, 1, 1}, {0, 5, 1}, {64, 1, 1, 1, false, false, true}}},
      {"few_rows_excited", 1, 64, 4, 8, {{1024, 1, 1}, {0, 5, 2}, {72, 1, 1, 1, true, true}}},
      {"few_rows_of_two_images", 2, 64, 4, 8, {{1024, 1, 1}, {0, 3, 1}, {64, 1, 1, 1, true}}},
  };
}

struct Built {
  std::vector<BlockStep> steps;
  std::vector<std::vector<float>> memory;  // what the steps point to
  std::vector<std::unique_ptr<Buffer>> packed;
  std::vector<float> input;
};

Built build(const Case& c) {
  Built b;
  b.input = random_values(int64_t{c.n} * c.c * c.h * c.w);
  const auto values = [&](int64_t count) {
    b.memory.push_back(random_values(count));
    return b.memory.back().data();
  };
  int channels = c.c, h = c.h, w = c.w;
  for (const Layer& layer : c.layers) {
    ConvProblem p{};
    p.n = c.n, p.c = channels, p.h = h, p.w = w;
    const bool norm = layer.r == 0;
    p.k = layer.k == 0 ? channels : layer.k, p.groups = layer.k == 0 && !norm ? channels : 1;
    p.r = p.s = norm ? 1 : layer.r;
    p.stride_h = p.stride_w = layer.stride;
    p.dil_h = p.dil_w = layer.dilation;
    p.pad_h = p.pad_w = (p.r - 1) / 2 * layer.dilation;
    p.dtype = DType::kFloat32;
    p.x_layout = p.y_layout = Layout::kNHWC;
    BlockStep step{};
    step.problem = p;
    if (norm) {
      static const double eps = 1e-5;
      step.variant = layer_norm_for(settings().cpu_isa, p.dtype);
      step.weights = &eps;
      step.epilogue.scale = values(p.k);
      step.epilogue.shift = values(p.k);
      b.steps.push_back(step);
      continue;
    }
    step.variant = variants()[select(Device::kCPU, Pass::kFprop, p)];
    const float* const weights = values(p.w_size());
    step.weights = weights;
    if (step.variant->pack_format != nullptr && step.variant->pack_format(p) != nullptr) {
      b.packed.push_back(std::make_unique<Buffer>(step.variant->packed_size(p)));
      step.variant->pack(p, weights, b.packed.back()->data.get(), parallel_with(1));
      step.weights = b.packed.back()->data.get();
    }
    step.epilogue.scale = values(p.k);
    step.epilogue.shift = values(p.k);
    step.epilogue.activation = Activation::silu;
    if (layer.residual) step.epilogue.residual = values(p.y_size());
    if (layer.input_as_residual) step.epilogue.residual = b.input.data();
    if (layer.excites) {
      const int squeezed = channels / 4 + 1;
      step.excites = true;
      step.excite = {values(int64_t{squeezed} * channels),
                     values(squeezed),
                     values(int64_t{squeezed} * channels),
                     values(channels),
                     channels,
                     squeezed,
                     Activation::relu,
                     c.n % 2 == 0 ? Gate::sigmoid : Gate::hardsigmoid};
    }
    b.steps.push_back(step);
    channels = p.k, h = p.p(), w = p.q();
  }
  return b;
}

// x scaled by its gates, in double.
void excite(const BlockStep& step, float* x) {
  const Excite& e = step.excite;
  const int64_t pixels = int64_t{step.problem.h} * step.problem.w;
  for (int64_t n = 0; n < step.problem.n; ++n, x += pixels * e.c) {
    std::vector<double> mean(e.c), squeezed(e.squeezed);
    for (int64_t i = 0; i < pixels * e.c; ++i) mean[i % e.c] += x[i] / static_cast<double>(pixels);
    for (int j = 0; j < e.squeezed; ++j) {
      double z = e.b1[j];
      for (int k = 0; k < e.c; ++k) z += double{e.w1[j * e.c + k]} * mean[k];
      squeezed[j] = z > 0 ? z : 0;
    }
    for (int k = 0; k < e.c; ++k) {
      double z = e.b2[k];
      for (int j = 0; j < e.squeezed; ++j) z += double{e.w2[k * e.squeezed + j]} * squeezed[j];
      const double gate = e.gate == Gate::sigmoid ? 1 / (1 + std::exp(-z)) : std::fmin(std::fmax(z + 3, 0), 6) / 6;
      for (int64_t i = 0; i < pixels; ++i) x[i * e.c + k] = static_cast<float>(x[i * e.c + k] * gate);
    }
  }
}

std::vector<float> one_by_one(const Built& b) {
  std::vector<float> x = b.input;
  for (const BlockStep& step : b.steps) {
    if (step.excites) excite(step, x.data());
    std::vector<float> y(step.problem.y_size());
    const int64_t bytes = step.variant->workspace ? step.variant->workspace(step.problem, 1) : 0;
    Buffer workspace(bytes);
    const Parallel parallel = parallel_with(1);
    LaunchArgs args{};
    args.a = x.data(), args.b = step.weights, args.out = y.data();
    args.epilogue = step.epilogue;
    args.workspace = workspace.data.get();
    args.parallel = &parallel;
    check(step.variant->launch(step.problem, args) == nullptr, step.variant->name);
    x = y;
  }
  return x;
}

void test(const Case& c, const SqueezeExcite& table, const std::string& isa) {
  const Built b = build(c);
  const std::string name = std::string(c.name) + ", " + isa;
  const char* const why = reject_block(b.steps);
  check(why == nullptr, name + " is rejected: " + (why ? why : ""));
  if (why != nullptr) return;
  const std::vector<float> expected = one_by_one(b);
  // Gates in float: a few roundings of sums of up to a few hundred terms, which the layer after multiplies.
  bool excited = false;
  double bound = 0;
  for (const BlockStep& step : b.steps) {
    excited |= step.excites;
    if (step.excites) bound = 4 * step.problem.c * std::sqrt(double(step.problem.c)) * 6e-8;
  }
  for (int threads : {1, 2, 3, 5}) {
    for (int64_t budget : {int64_t{1}, int64_t{6000}, int64_t{40000}, int64_t{1} << 20}) {
      const Parallel parallel = parallel_with(threads);
      Buffer workspace(block_workspace(b.steps, threads, budget)), out(expected.size() * sizeof(float));
      const char* failure =
          run_block(b.steps, b.input.data(), out.floats(), workspace.data.get(), table, parallel, budget);
      const std::string what = name + ", " + std::to_string(threads) + " threads, " + std::to_string(budget) + " bytes";
      check(failure == nullptr, what);
      if (!excited) {
        check(std::memcmp(out.floats(), expected.data(), expected.size() * sizeof(float)) == 0, what);
        continue;
      }
      double worst = 0;
      for (size_t i = 0; i < expected.size(); ++i) {
        const double distance = std::fabs(double{out.floats()[i]} - expected[i]);
        worst = distance <= worst ? worst : distance;  // NaN takes over
      }
      check(worst <= bound, what + ": " + std::to_string(worst));
    }
  }
}

void test_rejects() {
  Built b = build(cases()[0]);
  check(reject_block({}) != nullptr, "no steps");
  std::swap(b.steps[0], b.steps[2]);
  check(reject_block(b.steps) != nullptr, "steps that do not follow each other");
  b = build({"filter", 1, 8, 9, 9, {{8, 3, 1}}});
  check(reject_block(b.steps) != nullptr, "a 3x3 filter over all channels");
  b = build({"filter", 1, 8, 9, 9, {{0, 3, 1}, {8, 1, 1, 1, true}, {0, 3, 1}}});
  check(reject_block(b.steps) != nullptr, "a depthwise step after squeeze and excitation");
}

void test_mean(Isa isa, const std::string& name) {
  for (const int c : {1, 3, 16, 37, 64, 129, 200}) {
    const int n = 2, h = 5, w = 7;
    const std::vector<float> x = random_values(n * h * w * c);
    ConvProblem p{};
    p.n = n, p.c = p.k = p.groups = c, p.h = p.r = h, p.w = p.s = w;
    p.stride_h = p.stride_w = p.dil_h = p.dil_w = 1;
    p.dtype = DType::kFloat32, p.x_layout = p.y_layout = Layout::kNHWC;
    const Variant& mean = *mean_for(isa, DType::kFloat32);
    const std::string what = "mean of " + std::to_string(c) + " channels, " + name;
    check(mean.reject(p) == nullptr, what);
    for (const int threads : {1, 3}) {
      Buffer out(n * c * sizeof(float));
      const Parallel parallel = parallel_with(threads);
      LaunchArgs args{};
      args.a = x.data(), args.out = out.floats(), args.parallel = &parallel;
      check(mean.launch(p, args) == nullptr, what);
      for (int i = 0; i < n * c; ++i) {
        double sum = 0;
        for (int j = 0; j < h * w; ++j) sum += x[(i / c * h * w + j) * c + i % c];
        // Each value, of size 1 at most, is in at most h + w additions, and the product.
        check(std::fabs(out.floats()[i] - sum / (h * w)) <= (h + w + 1) * 6e-8, what);
      }
    }
    p.r = h - 1;
    check(mean.reject(p) != nullptr, what + ": a smaller filter");
  }
}

// A bfloat16 is the upper half of a float.
float widened(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

void test_mean_of_bfloat16() {
  const Variant* const mean = mean_for(Isa::kAVX512BF16, DType::kBFloat16);
  for (const int c : {1, 16, 37, 129}) {
    const int n = 2, h = 5, w = 7;
    std::vector<uint16_t> x(n * h * w * c);
    for (uint16_t& bits : x) {  // of size 1/8 to 1, of either sign
      bits = static_cast<uint16_t>(0x3e00 + generator() % 0x180 + (generator() % 2 << 15));
    }
    ConvProblem p{};
    p.n = n, p.c = p.k = p.groups = c, p.h = p.r = h, p.w = p.s = w;
    p.stride_h = p.stride_w = p.dil_h = p.dil_w = 1;
    p.dtype = DType::kBFloat16, p.x_layout = p.y_layout = Layout::kNHWC;
    std::vector<uint16_t> out(n * c + 1, 0x7777);
    const Parallel parallel = parallel_with(3);
    LaunchArgs args{};
    args.a = x.data(), args.out = out.data(), args.parallel = &parallel;
    const std::string what = "mean of " + std::to_string(c) + " channels in bfloat16";
    check(mean->reject(p) == nullptr && mean->launch(p, args) == nullptr && out[n * c] == 0x7777, what);
    for (int i = 0; i < n * c; ++i) {
      double sum = 0;
      for (int j = 0; j < h * w; ++j) sum += widened(x[(i / c * h * w + j) * c + i % c]);
      const double exact = sum / (h * w), summing = (h + w + 1) * 6e-8;  // as in float32; then one rounding
      check(std::fabs(widened(out[i]) - exact) <= summing + 0x1p-8 * (std::fabs(exact) + summing), what);
    }
  }
}

void check_phases(const std::vector<LayerBytes>& layers, int64_t batch, int threads, std::vector<int64_t> expected) {
  const std::vector<Phase> found = phases(layers, batch, threads, 1 << 20);
  const std::string what = std::to_string(layers.size()) + " layers, batch " + std::to_string(batch) + ", " +
                           std::to_string(threads) + " threads";
  int64_t next = 0;
  std::vector<int64_t> images;
  for (const Phase& phase : found) {
    check(phase.first == next && phase.count > 0, what + ": phases follow each other");
    check(phase.images == batch || batch % (phase.images * threads) == 0, what + ": every thread has as many images");
    next += phase.count;
    images.push_back(phase.images);
  }
  check(next == static_cast<int64_t>(layers.size()), what + ": every layer has a phase");
  check(images == expected, what + ": the phases' images");
}

void test_phases() {
  constexpr int64_t kMB = 1 << 20;
  const LayerBytes wide{kMB / 10, 4 * kMB, 2 * kMB}, deep{32 * kMB, kMB / 2, kMB / 4};
  check_phases({wide, wide}, 1, 1, {1});
  check_phases({wide, wide}, 8, 1, {1});
  check_phases({wide, wide}, 8, 2, {1});
  check_phases({wide, wide}, 3, 2, {3});   // one thread would have two
  check_phases({wide, wide}, 2, 16, {2});  // fewer images than threads
  check_phases({deep, deep}, 8, 1, {8});
  check_phases({wide, wide, deep, deep}, 8, 2, {1, 8});
  check_phases({wide, deep, deep, wide}, 8, 1, {8, 1});  // the first's seam, which is large, would cost more than it
  check_phases({wide, {kMB / 10, kMB, kMB / 2}, wide}, 8, 1, {1});  // no seam for what gains nothing by it
}

}  // namespace

int main() {
  for (const auto& [isa, name] : instruction_sets(detect_cpu_isa())) {
    settings().cpu_isa = isa;
    for (const Case& c : cases()) test(c, squeeze_excite_for(isa), name);
    test_mean(isa, name);
  }
  check(mean_for(Isa::kAVX512, DType::kBFloat16) == nullptr, "there is no mean of bfloat16 in AVX-512 alone");
  if (detect_cpu_isa() >= Isa::kAVX512BF16) test_mean_of_bfloat16();
  test_rejects();
  test_phases();
  return summary();
}
