// The batch-norm passes on CUDA, run from their own source on the CPU or on a GPU, against plain loops in float64.
//
//   cuda_batch_norm [--one-order] [--case <name> ...]
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/batch_norm/batch_norm.h"
#include "device.h"
#include "reference.h"
#include "tensor.h"

namespace convext {
namespace {

using namespace testing;
using cuda::NormParameters;
using cuda::NormShape;

struct Case {
  const char* name;
  int64_t n, c, h, w;
  Layout layout;
  double offset;  // added to y: a large mean over a small spread is where naive sums cancel
};

const Case kCases[] = {
    {"channels_last_vector", 2, 24, 5, 7, Layout::kNHWC, 0},
    {"channels_last_odd_channels", 2, 13, 4, 9, Layout::kNHWC, 0},
    {"channels_last_many_channels", 1, 520, 3, 5, Layout::kNHWC, 0},
    {"channels_last_many_pixels", 3, 8, 40, 33, Layout::kNHWC, 0},
    {"contiguous", 3, 5, 11, 9, Layout::kNCHW, 0},
    {"one_pixel_an_image", 6, 16, 1, 1, Layout::kNHWC, 0},
    {"mean_far_from_zero", 2, 8, 24, 24, Layout::kNHWC, 1000},
};

#define CONVEXT_X(name) +1
constexpr int kActivations = 0 CONVEXT_ACTIVATIONS(CONVEXT_X);
#undef CONVEXT_X

int failures = 0, checks = 0;

void expect(const char* what, const Case& c, DType dtype, int64_t i, double got, double want, double bound) {
  ++checks;
  if (std::abs(got - want) <= bound) return;
  printf("FAIL %s of %s, dtype %d: element %ld is %.9g, should be %.9g within %.2g\n", what, c.name,
         static_cast<int>(dtype), static_cast<long>(i), got, want, bound);
  ++failures;
}

void check(const char* what, const Case& c, DType dtype, const char* error) {
  if (error == nullptr) error = testing::wait_for_kernels();
  if (error == nullptr) return;
  printf("FAIL %s of %s, dtype %d: %s\n", what, c.name, static_cast<int>(dtype), error);
  ++failures;
}

void run(const Case& c, DType dtype, Activation activation, bool training, bool with_residual) {
  const NormShape shape{c.n, c.c, c.h, c.w, dtype, c.layout};
  const DType acc = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const int64_t pixels = c.n * c.h * c.w, size = pixels * c.c;
  const double u = reference::roundoff(acc), u_out = reference::roundoff(dtype);
  Tensor y(dtype, size, false, 1, c.offset), dout(dtype, size, true, 2), residual(dtype, size, false, 3);
  Tensor gamma(acc, c.c, false, 4), beta(acc, c.c, true, 5);
  Tensor mean(acc, c.c, false), var(acc, c.c, false), out(dtype, size, false), dy(dtype, size, false);
  Tensor dresidual(dtype, size, false), dgamma(acc, c.c, false), dbeta(acc, c.c, false);
  DeviceBuffer workspace(cuda::norm_workspace(shape));
  const auto channel = [&](int64_t i) { return c.layout == Layout::kNHWC ? i % c.c : i / (c.h * c.w) % c.c; };

  check("batch_stats", c, dtype,
        cuda::launch_batch_stats(shape, y.buffer.data(), mean.buffer.data(), var.buffer.data(), workspace.data(),
                                 nullptr));
  std::vector<double> m(c.c), v(c.c), peak(c.c);
  for (int64_t i = 0; i < size; ++i) m[channel(i)] += y.host[i] / pixels;
  for (int64_t i = 0; i < size; ++i) {
    const double d = y.host[i] - m[channel(i)];
    v[channel(i)] += d * d / pixels;
    peak[channel(i)] = std::max(peak[channel(i)], std::abs(y.host[i]));
  }
  const double root = std::sqrt(double(pixels) + 1);
  for (int64_t k = 0; k < c.c; ++k) {
    // Each of Welford's updates rounds at the size of the mean, and of the deviation times the rounded mean.
    expect("mean", c, dtype, k, mean[k], m[k], 4 * root * u * peak[k]);
    expect("var", c, dtype, k, var[k], v[k], 4 * root * u * (v[k] + std::sqrt(v[k]) * peak[k]));
  }
  // From here on with exactly the statistics that the kernels see.
  const NormParameters parameters{mean.buffer.data(), var.buffer.data(), gamma.buffer.data(), beta.buffer.data(), 1e-3};
  const void* added = with_residual ? residual.buffer.data() : nullptr;
  check("bn_act", c, dtype,
        cuda::launch_bn_act(shape, parameters, activation, y.buffer.data(), added, out.buffer.data(), nullptr));
  check("bn_act_backward", c, dtype,
        cuda::launch_bn_act_backward(shape, parameters, activation, training, dout.buffer.data(), y.buffer.data(),
                                     added, dy.buffer.data(), dgamma.buffer.data(), dbeta.buffer.data(),
                                     with_residual ? dresidual.buffer.data() : nullptr, workspace.data(), nullptr));
  std::vector<double> g(size), xhat(size), sum(c.c), product(c.c), sum_of_magnitudes(c.c), product_of_magnitudes(c.c);
  for (int64_t i = 0; i < size; ++i) {
    const int64_t k = channel(i);
    xhat[i] = (y.host[i] - mean[k]) / std::sqrt(var[k] + 1e-3);
    const double z = xhat[i] * gamma.host[k] + beta.host[k] + (with_residual ? residual.host[i] : 0.0);
    visit_activation<double>(activation, [&](auto f) {
      const double bound = 16 * u * (1 + std::abs(xhat[i]) + std::abs(z)) + 1.01 * u_out * std::abs(f.forward(z));
      expect("bn_act", c, dtype, i, out[i], f.forward(z), bound + kSmallestHalf);
      g[i] = dout.host[i] * f.derivative(z);
    });
    sum[k] += g[i];
    product[k] += g[i] * xhat[i];
    sum_of_magnitudes[k] += std::abs(g[i]);
    product_of_magnitudes[k] += std::abs(g[i] * xhat[i]);
  }
  for (int64_t k = 0; k < c.c; ++k) {
    expect("dbeta", c, dtype, k, dbeta[k], sum[k], 16 * root * u * (sum_of_magnitudes[k] + 1));
    expect("dgamma", c, dtype, k, dgamma[k], product[k], 16 * root * u * (product_of_magnitudes[k] + 1));
  }
  for (int64_t i = 0; i < size; ++i) {
    const int64_t k = channel(i);
    const double factor = gamma.host[k] / std::sqrt(var[k] + 1e-3);
    double inner = g[i];
    if (training) inner -= sum[k] / pixels + xhat[i] * product[k] / pixels;
    const double bound =
        64 * root * u * std::abs(factor) * (1 + xhat[i] * xhat[i]) + 1.01 * u_out * std::abs(factor * inner);
    expect("dy", c, dtype, i, dy[i], factor * inner, bound + kSmallestHalf);
    if (!with_residual) continue;
    expect("dresidual", c, dtype, i, dresidual[i], g[i], 16 * u + 1.01 * u_out * std::abs(g[i]) + kSmallestHalf);
  }
}

void run_fold(DType acc) {
  const Case c{"fold", 1, 300, 1, 1, Layout::kNHWC, 0};
  Tensor mean(acc, c.c, false, 1), var(acc, c.c, false, 2, 1.5), gamma(acc, c.c, false, 3), beta(acc, c.c, false, 4);
  Tensor bias(acc, c.c, false, 5), scale(acc, c.c, false), shift(acc, c.c, false);
  const NormParameters all{mean.buffer.data(), var.buffer.data(), gamma.buffer.data(), beta.buffer.data(), 1e-5};
  check("fold", c, acc,
        cuda::launch_fold(c.c, acc, all, bias.buffer.data(), scale.buffer.data(), shift.buffer.data(), nullptr));
  for (int64_t k = 0; k < c.c; ++k) {
    const double s = gamma.host[k] / std::sqrt(var.host[k] + 1e-5);
    const double bound = 16 * reference::roundoff(acc) * (1 + std::abs(s));
    expect("scale", c, acc, k, scale[k], s, bound);
    expect("shift", c, acc, k, shift[k], beta.host[k] + (bias.host[k] - mean.host[k]) * s, 4 * bound);
  }
}

}  // namespace
}  // namespace convext

int main(int argc, char** argv) {
  using namespace convext;
  bool one_order = !testing::kPoliciesMatter;
  std::vector<std::string> cases;
  for (int i = 1; i < argc; ++i) {
    if (!strcmp(argv[i], "--one-order")) one_order = true;
    else if (!strcmp(argv[i], "--case") && i + 1 < argc) cases.push_back(argv[++i]);
  }
  for (const auto order : {testing::Order::kLifo, testing::Order::kRandom}) {
    testing::set_policy(testing::Async::kLazy, order, 7);
    for (const Case& c : kCases) {
      if (!cases.empty() && std::find(cases.begin(), cases.end(), c.name) == cases.end()) continue;
      for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
        if (c.offset != 0 && dtype_size(dtype) == 2) continue;  // half precision cannot hold the spread
        for (int activation = 0; activation < kActivations; ++activation) {
          for (const bool training : {false, true}) {
            for (const bool with_residual : {false, true}) {
              run(c, dtype, static_cast<Activation>(activation), training, with_residual);
            }
          }
        }
      }
    }
    run_fold(DType::kFloat32);
    run_fold(DType::kFloat64);
    if (one_order) break;
  }
  printf("%d checks, %d failures\n", checks, failures);
  return failures != 0 || checks == 0;
}
