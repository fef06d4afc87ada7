// Stand-alone test of LayerNorm (layer_norm.h) against plain loops in long double, and of GELU's distribution function
// in float32 (vec.h) against the C library's, on every instruction set that this CPU has. No torch. Exits non-zero on
// failure.
#include "cpu/kernels/elementwise/layer_norm.h"

#include <cmath>
#include <limits>

#include "core/select.h"
#include "harness.h"

namespace {

using namespace convext;
using namespace convext::testing;

ConvProblem pointwise(int pixels, int c, DType dtype) {
  ConvProblem p{};
  p.n = 1, p.h = 1, p.w = pixels;
  p.c = p.k = c;
  p.r = p.s = p.stride_h = p.stride_w = p.dil_h = p.dil_w = p.groups = 1;
  p.dtype = dtype;
  p.x_layout = p.y_layout = Layout::kNHWC;
  return p;
}

// The mean errs by half a rounding of itself, because it is corrected by what it leaves, and by the rounding of that: a
// walk of c steps whose partial sums are within sqrt(c) standard deviations, divided by c, which is within a rounding
// of one deviation, twice with what each difference rounds. What this is beside the standard deviation, every output
// may err by. Sums of c squares, and what follows, add a few roundings of the output.
template <class T>
void test_layer_norm(DType dtype, Isa isa, int c, T mean, bool affine) {
  constexpr int kPixels = 7;
  const std::string what = "layer norm of " + std::to_string(c) + " channels, mean " + std::to_string(double(mean)) +
                           ", isa " + std::to_string(static_cast<int>(isa)) + ", dtype " +
                           std::to_string(static_cast<int>(dtype));
  std::mt19937 generator(c);
  std::normal_distribution<double> normal(mean, 1);
  std::vector<T> x(kPixels * c), y(kPixels * c, std::numeric_limits<T>::quiet_NaN()), gamma(c), beta(c);
  for (auto* values : {&x, &gamma, &beta}) {
    for (T& v : *values) v = static_cast<T>(values == &x ? normal(generator) : normal(generator) - mean);
  }
  const double eps = 1e-6;
  LaunchArgs args{};
  args.a = x.data(), args.b = &eps, args.out = y.data();
  args.parallel = &kSerial;
  if (affine) args.epilogue.scale = gamma.data(), args.epilogue.shift = beta.data();
  const Variant* const variant = layer_norm_for(isa, dtype);
  check(variant->launch(pointwise(kPixels, c, dtype), args) == nullptr, what);
  for (int i = 0; i < kPixels; ++i) {
    long double sum = 0, squares = 0;
    for (int k = 0; k < c; ++k) sum += x[i * c + k];
    for (int k = 0; k < c; ++k) squares += (x[i * c + k] - sum / c) * (x[i * c + k] - sum / c);
    const long double deviation = std::sqrt(squares / c + eps), unit = std::numeric_limits<T>::epsilon();
    for (int k = 0; k < c; ++k) {
      const long double z = (x[i * c + k] - sum / c) / deviation, scale = affine ? gamma[k] : T(1);
      const long double expected = z * scale + (affine ? beta[k] : T(0));
      const long double allowed =
          unit * (std::fabs(scale) * (std::fabs(sum / c) / deviation + 2 + 8 * std::fabs(z)) + std::fabs(expected));
      check(std::fabs(y[i * c + k] - expected) <= allowed, what + ", pixel " + std::to_string(i));
    }
  }
}

void test_special_values(Isa isa) {
  const double eps = 1e-5;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> x(3 * 20, 2.5f), y(3 * 20);
  x[20 + 19] = nan;
  LaunchArgs args{};
  args.a = x.data(), args.b = &eps, args.out = y.data();
  args.parallel = &kSerial;
  check(layer_norm_for(isa, DType::kFloat32)->launch(pointwise(3, 20, DType::kFloat32), args) == nullptr, "special");
  for (int k = 0; k < 20; ++k) {
    check(y[k] == 0 && y[40 + k] == 0, "channels that are all equal give zero");
    check(std::isnan(y[20 + k]), "a NaN reaches all of its pixel, and no other");
  }
}

// z P(X <= z) through the epilogue of a 1x1 layer that multiplies by one.
void test_gelu(Isa isa) {
  constexpr int kChannels = 16, kPixels = 40000;
  const ConvProblem p = pointwise(kPixels, kChannels, DType::kFloat32);
  const Variant& variant = *variants()[select(Device::kCPU, Pass::kFprop, p)];
  std::vector<float> w(kChannels * kChannels), x(kChannels * kPixels), y(x.size());
  for (int k = 0; k < kChannels; ++k) w[k * kChannels + k] = 1;
  for (size_t i = 0; i < x.size(); ++i) x[i] = -9 + 18 * static_cast<float>(i) / static_cast<float>(x.size());
  std::vector<char> packed(variant.packed_size(p)), workspace(variant.workspace ? variant.workspace(p, 1) : 0);
  variant.pack(p, w.data(), packed.data(), kSerial);
  LaunchArgs args{};
  args.a = x.data(), args.b = packed.data(), args.out = y.data();
  args.workspace = workspace.data();
  args.epilogue.activation = Activation::gelu;
  args.parallel = &kSerial;
  check(variant.launch(p, args) == nullptr, variant.name);
  // The fit's error and the a priori bound of its rounding, vec.h; half a rounding of the product.
  const double unit = std::ldexp(1.0, -24);
  double worst = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double z = x[i], expected = z * std::erfc(-z / std::sqrt(2.0)) / 2;
    worst = std::fmax(worst, std::fabs(y[i] - expected) / (std::fabs(z) * (5.6e-9 + 13.7 * unit + unit) + 1e-30));
  }
  check(worst <= 1, "gelu, isa " + std::to_string(static_cast<int>(isa)) + ": " + std::to_string(worst));
}

}  // namespace

int main() {
  for (const auto& [isa, name] : instruction_sets(detect_cpu_isa())) {
    settings().cpu_isa = isa;
    for (int c : {1, 2, 7, 15, 16, 17, 31, 32, 33, 96, 100, 768, 1000}) {
      for (bool affine : {false, true}) {
        for (double mean : {0.0, -3.0, 1e4}) {
          test_layer_norm<float>(DType::kFloat32, isa, c, static_cast<float>(mean), affine);
          test_layer_norm<double>(DType::kFloat64, isa, c, mean, affine);
        }
      }
    }
    test_special_values(isa);
    test_gelu(isa);
  }
  check(layer_norm_for(Isa::kPortable, DType::kBFloat16) == nullptr, "there is no bfloat16 form");
  return summary();
}
