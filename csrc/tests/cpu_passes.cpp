// Stand-alone test of the CPU passes that are no convolution: staging (staging.h) and batch norm (batch_norm.h), for
// every instruction set that this CPU has, against plain loops in long double. No torch. Exits non-zero on failure.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/select.h"
#include "cpu/kernels/elementwise/batch_norm.h"
#include "cpu/kernels/elementwise/staging.h"
#include "harness.h"

namespace convext {
namespace {

using Real = long double;

using testing::check;
using testing::NamedIsa;

Parallel parallel_with(int threads) {
  if (threads == 1) {
    return {[](int64_t begin, int64_t end, int64_t, RangeBody body, void* context) { body(context, begin, end); }, 1};
  }
  return {[](int64_t begin, int64_t end, int64_t, RangeBody body, void* context) {
    const int64_t middle = begin + (end - begin) / 3;
    std::thread other(body, context, begin, middle);
    body(context, middle, end);
    other.join();
  }, threads};
}

// ---- dtypes, written without the tricks of the code under test ----

const char* name_of(DType dtype) {
  static const char* const names[] = {"f32", "f64", "bf16", "f16"};
  return names[static_cast<int>(dtype)];
}

Real decode(uint16_t bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const Real sign = bits >> 15 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) {
    return mantissa ? std::numeric_limits<Real>::quiet_NaN() : sign * std::numeric_limits<Real>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(Real(mantissa), 1 - bias - mantissa_bits);
  return sign * std::ldexp(Real(mantissa + (1 << mantissa_bits)), exponent - bias - mantissa_bits);
}

Real read(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat32: return static_cast<const float*>(data)[i];
    case DType::kFloat64: return static_cast<const double*>(data)[i];
    case DType::kBFloat16: return decode(static_cast<const uint16_t*>(data)[i], 8, 7);
    default: return decode(static_cast<const uint16_t*>(data)[i], 5, 10);
  }
}

// The nearest value of the dtype, ties to even.
Real rounded(Real v, DType dtype) {
  if (dtype == DType::kFloat64) return static_cast<double>(v);
  if (dtype == DType::kFloat32) return static_cast<float>(v);
  if (std::isnan(v) || std::isinf(v) || v == 0) return v;
  const int mantissa_bits = dtype == DType::kBFloat16 ? 7 : 10;
  const int min_exponent = dtype == DType::kBFloat16 ? -126 : -14, max_exponent = 1 - min_exponent;
  int exponent;
  std::frexp(v, &exponent);
  const int place = std::max(exponent - 1, min_exponent) - mantissa_bits;
  const Real result = std::ldexp(std::nearbyint(std::ldexp(v, -place)), place);
  if (std::fabs(result) >= std::ldexp(Real(1), max_exponent + 1)) return v > 0 ? INFINITY : -INFINITY;
  return result;
}

bool same(Real a, Real b) { return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b)); }

// A buffer of exactly the bytes asked for, so that the address sanitizer sees every step outside.
struct Buffer {
  DType dtype;
  std::vector<char> bytes;
  Buffer(int64_t count, DType d) : dtype(d), bytes(count * dtype_size(d)) {}
  void* data() { return bytes.data(); }
  const void* data() const { return bytes.data(); }
  Real at(int64_t i) const { return read(data(), dtype, i); }
  void set(int64_t i, double v) {
    switch (dtype) {
      case DType::kFloat32: reinterpret_cast<float*>(bytes.data())[i] = static_cast<float>(v); break;
      case DType::kFloat64: reinterpret_cast<double*>(bytes.data())[i] = v; break;
      default: set_half(i, v);
    }
  }
  void set_half(int64_t i, double v) {
    // The nearest by search over the sorted magnitudes.
    uint16_t low = 0, high = dtype == DType::kBFloat16 ? 0x7f80 : 0x7c00;
    while (high - low > 1) {
      const uint16_t middle = (low + high) / 2;
      if (read(&middle, dtype, 0) <= std::fabs(v)) low = middle;
      else high = middle;
    }
    reinterpret_cast<uint16_t*>(bytes.data())[i] = low | (std::signbit(v) ? 0x8000 : 0);
  }
};

// ---- staging ----

struct Strides {
  const char* name;
  int64_t stride[4];
  int64_t extent;  // elements of the buffer behind it
};

std::vector<Strides> strides_of(const int64_t (&s)[4], bool as_destination) {
  const int64_t n = s[0], c = s[1], h = s[2], w = s[3];
  std::vector<Strides> all = {
      {"nchw", {c * h * w, h * w, w, 1}, n * c * h * w},
      {"nhwc", {h * w * c, 1, w * c, c}, n * c * h * w},
      {"nhwc_with_gaps", {h * w * (c + 3), 1, w * (c + 3), c + 3}, n * h * w * (c + 3)},
      {"nchw_every_other_column", {c * h * w * 2, h * w * 2, w * 2, 2}, n * c * h * w * 2},
      {"nchw_rows_padded", {c * h * (w + 5), h * (w + 5), w + 5, 1}, n * c * h * (w + 5)},
      {"transposed_image", {c * h * w, h * w, 1, h}, n * c * h * w},
  };
  if (!as_destination) {
    all.push_back({"expanded_scalar", {0, 0, 0, 0}, 1});
    all.push_back({"expanded_channels", {h * w, 0, w, 1}, n * h * w});
  }
  return all;
}

int64_t at(const int64_t* stride, int64_t n, int64_t c, int64_t h, int64_t w) {
  return n * stride[0] + c * stride[1] + h * stride[2] + w * stride[3];
}

void copy_every_layout_and_dtype(const Staging& staging, const std::string& isa) {
  const int64_t sizes[][4] = {{1, 1, 1, 1},   {2, 3, 5, 7},   {1, 16, 4, 4}, {2, 33, 3, 11}, {1, 70, 9, 15},
                              {3, 17, 1, 66}, {2, 130, 7, 7}, {64, 9, 3, 3}, {2, 4, 6, 9},   {1, 2, 5, 33}};
  std::mt19937 random(7);
  std::normal_distribution<double> normal;
  for (const auto& size : sizes) {
    for (int pair = 0; pair < 16; ++pair) {
      const DType src_dtype = static_cast<DType>(pair / 4), dst_dtype = static_cast<DType>(pair % 4);
      for (const Strides& from : strides_of(size, false)) {
        Buffer src(from.extent, src_dtype);
        for (int64_t i = 0; i < from.extent; ++i) src.set(i, normal(random));
        std::vector<Real> expected(from.extent);
        for (int64_t i = 0; i < from.extent; ++i) expected[i] = rounded(src.at(i), dst_dtype);
        for (const Strides& to : strides_of(size, true)) {
          Buffer dst(to.extent, dst_dtype);
          staging.copy(parallel_with(1 + pair % 2), src.data(), src_dtype, from.stride, dst.data(), dst_dtype,
                       to.stride, size);
          std::vector<Real> wanted(to.extent, 0);  // gaps are left alone
          for (int64_t n = 0; n < size[0]; ++n)
            for (int64_t c = 0; c < size[1]; ++c)
              for (int64_t h = 0; h < size[2]; ++h)
                for (int64_t w = 0; w < size[3]; ++w)
                  wanted[at(to.stride, n, c, h, w)] = expected[at(from.stride, n, c, h, w)];
          bool ok = true;
          for (int64_t i = 0; i < to.extent; ++i) ok &= same(dst.at(i), wanted[i]);
          check(ok, isa + " copy " + from.name + " " + name_of(src_dtype) + " to " + to.name + " " +
                        name_of(dst_dtype) + " c=" + std::to_string(size[1]));
        }
      }
    }
  }
}

void copy_large_with_threads(const Staging& staging, const std::string& isa) {
  const int64_t size[4] = {3, 65, 23, 29};
  for (const Strides& from : strides_of(size, true)) {
    for (const Strides& to : strides_of(size, true)) {
      Buffer src(from.extent, DType::kFloat32), dst(to.extent, DType::kFloat32);
      for (int64_t i = 0; i < from.extent; ++i) src.set(i, static_cast<double>(i));
      staging.copy(parallel_with(3), src.data(), src.dtype, from.stride, dst.data(), dst.dtype, to.stride, size);
      bool ok = true;
      for (int64_t i = 0; i < size[0] * size[1] * size[2] * size[3]; ++i) {
        const int64_t w = i % size[3], h = i / size[3] % size[2], c = i / size[3] / size[2] % size[1];
        const int64_t n = i / size[3] / size[2] / size[1];
        ok &= dst.at(at(to.stride, n, c, h, w)) == src.at(at(from.stride, n, c, h, w));
      }
      check(ok, isa + " threaded copy " + from.name + " to " + to.name);
    }
  }
}

// Every half there is, there and back; every rounding boundary between two neighbours, and just beside it.
void halves_round_to_nearest_even(const Staging& staging, const std::string& isa) {
  for (DType half : {DType::kBFloat16, DType::kFloat16}) {
    const int64_t size[4] = {1, 1, 1, 65536}, stride[4] = {0, 0, 0, 1};
    std::vector<uint16_t> all(65536), back(65536);
    for (int i = 0; i < 65536; ++i) all[i] = static_cast<uint16_t>(i);
    std::vector<float> wide(65536);
    staging.copy(parallel_with(1), all.data(), half, stride, wide.data(), DType::kFloat32, stride, size);
    staging.copy(parallel_with(1), wide.data(), DType::kFloat32, stride, back.data(), half, stride, size);
    bool widened = true, narrowed = true;
    for (int i = 0; i < 65536; ++i) {
      const Real exact = read(all.data(), half, i);
      widened &= same(wide[i], exact);
      narrowed &= same(read(back.data(), half, i), exact);
    }
    check(widened, isa + " every " + name_of(half) + " widens exactly");
    check(narrowed, isa + " every " + name_of(half) + " survives the way back");

    std::vector<float> values = {65519.996f,    65520.0f, 65504.0f, 1e30f, 3.4e38f,  1e-8f,     2.9802322e-8f,
                                 2.9802326e-8f, 1e-45f,   -0.0f,    0.0f,  INFINITY, -INFINITY, NAN};
    const int top = half == DType::kBFloat16 ? 0x7f80 : 0x7c00;
    for (int i = 0; i + 1 < top; ++i) {
      const uint16_t pair[2] = {static_cast<uint16_t>(i), static_cast<uint16_t>(i + 1)};
      const float tie = static_cast<float>((read(pair, half, 0) + read(pair, half, 1)) / 2);
      for (float v : {tie, std::nextafterf(tie, 0.0f), std::nextafterf(tie, INFINITY)}) {
        values.push_back(i % 2 ? v : -v);
      }
    }
    const int64_t count[4] = {1, 1, 1, static_cast<int64_t>(values.size())};
    std::vector<uint16_t> narrow(values.size());
    staging.copy(parallel_with(1), values.data(), DType::kFloat32, stride, narrow.data(), half, stride, count);
    int wrong = 0;
    for (size_t i = 0; i < values.size(); ++i) wrong += !same(read(narrow.data(), half, i), rounded(values[i], half));
    check(wrong == 0, isa + " " + std::to_string(wrong) + " ties of " + name_of(half) + " do not round to even");

    // A double must not be rounded twice on its way: 1 + 2^-m-1 + 2^-40 is above the tie, its float is not.
    const int mantissa = half == DType::kBFloat16 ? 7 : 10;
    const std::vector<double> doubles = {1 + std::ldexp(1.0, -mantissa - 1) + std::ldexp(1.0, -40),
                                         1 + 3 * std::ldexp(1.0, -mantissa - 1) - std::ldexp(1.0, -40)};
    const int64_t two[4] = {1, 1, 1, 2};
    staging.copy(parallel_with(1), doubles.data(), DType::kFloat64, stride, narrow.data(), half, stride, two);
    for (int i = 0; i < 2; ++i) {
      check(same(read(narrow.data(), half, i), rounded(doubles[i], half)),
            isa + " double rounding through float to " + name_of(half));
    }
  }
}

void test_staging(const NamedIsa& isa) {
  const Staging& staging = staging_for(isa.isa);
  copy_every_layout_and_dtype(staging, isa.name);
  copy_large_with_threads(staging, isa.name);
  halves_round_to_nearest_even(staging, isa.name);
}

// ---- batch norm ----

Real forward(Activation a, Real z) {
  switch (a) {
    case Activation::relu: return z < 0 ? 0 : z;
    case Activation::relu6: return z < 0 ? 0 : z > 6 ? 6 : z;
    case Activation::silu: return z / (1 + std::exp(-z));
    case Activation::hardswish: return z * std::min<Real>(std::max<Real>(z + 3, 0), 6) / 6;
    case Activation::gelu: return z / 2 * (1 + std::erf(z / std::sqrt(Real(2))));
    default: return z;
  }
}

Real derivative(Activation a, Real z) {
  const Real sigmoid = 1 / (1 + std::exp(-z));
  switch (a) {
    case Activation::relu: return z > 0;
    case Activation::relu6: return z > 0 && z < 6;
    case Activation::silu: return sigmoid * (1 + z * (1 - sigmoid));
    case Activation::hardswish: return z < -3 ? 0 : z < 3 ? z / 3 + Real(0.5) : 1;
    case Activation::gelu:
      return (1 + std::erf(z / std::sqrt(Real(2)))) / 2 + z * std::exp(-z * z / 2) / std::sqrt(2 * std::acos(Real(-1)));
    default: return 1;
  }
}

// Whether the derivative jumps within `reach` of z: there, either side is right.
bool at_kink(Activation a, Real z, Real reach) {
  if (a == Activation::relu6 && std::fabs(z - 6) <= reach) return true;
  if (a == Activation::hardswish && std::fabs(std::fabs(z) - 3) <= reach) return true;
  return (a == Activation::relu || a == Activation::relu6) && std::fabs(z) <= reach;
}

Real epsilon(DType dtype) {
  static const Real unit[] = {std::ldexp(Real(1), -24), std::ldexp(Real(1), -53), std::ldexp(Real(1), -8),
                              std::ldexp(Real(1), -11)};
  return unit[static_cast<int>(dtype)];
}

DType compute_dtype(DType dtype) { return dtype == DType::kFloat64 ? dtype : DType::kFloat32; }

struct Shape {
  int64_t n, c, hw;
};

struct Case {
  Shape shape;
  Layout layout;
  DType dtype;
  Activation activation;
  bool norm, affine, residual, training;
  double offset;  // of y's mean, in standard deviations

  std::string name() const {
    return std::string(name_of(dtype)) + (layout == Layout::kNHWC ? " nhwc" : " nchw") +
           " n=" + std::to_string(shape.n) + " c=" + std::to_string(shape.c) + " hw=" + std::to_string(shape.hw) +
           " activation=" + std::to_string(static_cast<int>(activation)) + (norm ? " norm" : "") +
           (affine ? " affine" : "") + (residual ? " residual" : "") + (training ? " training" : " frozen") +
           " offset=" + std::to_string(offset);
  }
  int64_t index(int64_t n, int64_t c, int64_t i) const {
    return layout == Layout::kNHWC ? (n * shape.hw + i) * shape.c + c : (n * shape.c + c) * shape.hw + i;
  }
};

struct Outputs {
  Buffer mean, var, out, dy, dgamma, dbeta, dresidual;
  bool operator==(const Outputs& o) const {
    return mean.bytes == o.mean.bytes && var.bytes == o.var.bytes && out.bytes == o.out.bytes &&
           dy.bytes == o.dy.bytes && dgamma.bytes == o.dgamma.bytes && dbeta.bytes == o.dbeta.bytes &&
           dresidual.bytes == o.dresidual.bytes;
  }
};

void test_batch_norm_case(const BatchNorm& table, const Case& test, const std::string& isa) {
  const auto [N, C, HW] = test.shape;
  const int64_t size = N * C * HW, M = N * HW;
  const DType dtype = test.dtype, compute = compute_dtype(dtype);
  const Real eps = epsilon(compute), store = dtype == compute ? 0 : epsilon(dtype);
  std::mt19937 random(11);
  std::normal_distribution<double> normal;
  auto fill = [&](int64_t count, DType type, double scale, double shift) {
    Buffer b(count, type);
    for (int64_t i = 0; i < count; ++i) b.set(i, normal(random) * scale + shift);
    return b;
  };
  const Buffer y = fill(size, dtype, 1, test.offset), residual = fill(size, dtype, 1, 0);
  const Buffer dout = fill(size, dtype, 1, 0);
  const Buffer gamma = fill(C, compute, 0.5, 1), beta = fill(C, compute, 1, 1);
  BatchNormArgs args{N, C, HW, test.layout, dtype, y.data()};
  if (test.residual) args.residual = residual.data();
  if (test.affine) args.gamma = gamma.data(), args.beta = beta.data();
  args.eps = 1e-5, args.activation = test.activation;

  auto run = [&](int threads) {
    Outputs o{Buffer(C, DType::kFloat64), Buffer(C, compute), Buffer(size, dtype), Buffer(size, dtype),
              Buffer(C, compute),         Buffer(C, compute), Buffer(size, dtype)};
    BatchNormArgs call = args;
    std::vector<double> workspace((table.workspace(call) + 7) / 8);
    const Parallel parallel = parallel_with(threads);
    table.batch_stats(parallel, call, static_cast<double*>(o.mean.data()), o.var.data(), workspace.data());
    Buffer mean(C, compute), rest(C, compute);
    for (int64_t c = 0; c < C; ++c) {
      mean.set(c, o.mean.at(c));
      rest.set(c, o.mean.at(c) - mean.at(c));
    }
    if (test.norm) call.mean = mean.data(), call.mean_rest = rest.data(), call.var = o.var.data();
    table.bn_act(parallel, call, o.out.data(), workspace.data());
    const BatchNormGradients gradients{
        dout.data(),  o.dy.data(), o.dgamma.data(), o.dbeta.data(), test.residual ? o.dresidual.data() : nullptr,
        test.training};
    table.bn_act_backward(parallel, call, gradients, workspace.data());
    if (test.norm && test.training && !test.residual) {
      const bool keeps = table.keeps_dz(call);
      Buffer out(size, dtype), dy(size, dtype), dgamma(C, compute), dbeta(C, compute);
      std::vector<double> sums(2 * C);
      const BatchNormSums found{sums.data(), keeps ? dy.data() : nullptr};
      table.bn_act_and_sums(parallel, call, dout.data(), out.data(), found, workspace.data());
      const BatchNormGradients rest{
          keeps ? nullptr : dout.data(), dy.data(), dgamma.data(), dbeta.data(), nullptr, true};
      table.bn_act_from_sums(parallel, call, rest, sums.data(), workspace.data());
      check(out.bytes == o.out.bytes && dy.bytes == o.dy.bytes && dgamma.bytes == o.dgamma.bytes &&
                dbeta.bytes == o.dbeta.bytes,
            isa + " in two calls differs: " + test.name());
      Buffer again(size, dtype);
      const BatchNormGradients anew{dout.data(), again.data(), dgamma.data(), dbeta.data(), nullptr, true};
      table.bn_act_from_sums(parallel, call, anew, sums.data(), workspace.data());
      check(again.bytes == o.dy.bytes, isa + " with dz computed anew differs: " + test.name());
    }
    return o;
  };
  const Outputs got = run(1);
  check(got == run(3), isa + " depends on the threads: " + test.name());

  const Real growth = 8 + std::sqrt(Real(M));           // rounding of a sum of M terms
  Real worst_out = 0, worst_dy = 0, worst_channel = 0;  // error over bound
  for (int64_t c = 0; c < C; ++c) {
    Real mean = 0, var = 0;
    for (int64_t n = 0; n < N; ++n)
      for (int64_t i = 0; i < HW; ++i) mean += y.at(test.index(n, c, i)) / M;
    for (int64_t n = 0; n < N; ++n)
      for (int64_t i = 0; i < HW; ++i) var += std::pow(y.at(test.index(n, c, i)) - mean, 2) / M;
    // Sums run around a value up to 4 standard deviations off the mean: 1 + 4^2 times the variance.
    const Real deviation = std::sqrt(var) + store * std::fabs(mean);
    worst_channel = std::max(worst_channel, std::fabs(got.mean.at(c) - mean) /
                                                (eps * std::fabs(mean) + 4 * growth * eps * deviation + 1e-30L));
    worst_channel =
        std::max(worst_channel, std::fabs(got.var.at(c) - var) / (17 * growth * eps * deviation * deviation + 1e-30L));

    // From here on with the mean and variance that the code under test was given.
    const Real m = test.norm ? got.mean.at(c) : 0;
    const Real inverse = test.norm ? 1 / std::sqrt(got.var.at(c) + Real(1e-5)) : 1;
    const Real g = test.affine ? gamma.at(c) : 1, b = test.affine ? beta.at(c) : 0, scale = g * inverse;
    Real sum = 0, product = 0, sum_bound = 0, product_bound = 0;
    std::vector<Real> dz(M), dz_bound(M);
    for (int64_t n = 0; n < N; ++n)
      for (int64_t i = 0; i < HW; ++i) {
        const int64_t at = test.index(n, c, i), j = n * HW + i;
        const Real centered = y.at(at) - m, r = test.residual ? residual.at(at) : 0;
        const Real z = centered * scale + b + r;
        const Real z_bound = 8 * eps * (std::fabs(centered * scale) + std::fabs(b) + std::fabs(r));
        const Real out = forward(test.activation, z);
        const Real out_bound = 1.5L * z_bound + 16 * eps * (std::fabs(z) + std::fabs(out)) + store * std::fabs(out) +
                               1e-7L * (dtype == DType::kFloat16) + 1e-30L;
        worst_out = std::max(worst_out, std::fabs(got.out.at(at) - out) / out_bound);
        dz[j] = dout.at(at) * derivative(test.activation, z);
        dz_bound[j] = std::fabs(dout.at(at)) *
                      (2 * z_bound + 16 * eps * (1 + std::fabs(z)) + (at_kink(test.activation, z, z_bound) ? 1 : 0));
        sum += dz[j];
        product += dz[j] * centered;
        sum_bound += dz_bound[j] + growth * eps * std::fabs(dz[j]) / std::sqrt(Real(M));
        product_bound +=
            std::fabs(centered) * (dz_bound[j] + (growth / std::sqrt(Real(M)) + 4) * eps * std::fabs(dz[j]));
      }
    // The terms of a sum are of either sign: its rounding grows with the root of their number.
    sum_bound += growth * eps * std::sqrt(Real(M)) + 1e-30L;
    product_bound += growth * eps * std::sqrt(Real(M)) * (deviation + std::fabs(mean - m)) + 1e-30L;
    worst_channel = std::max(worst_channel, std::fabs(got.dbeta.at(c) - sum) / sum_bound);
    worst_channel = std::max(worst_channel, std::fabs(got.dgamma.at(c) - product * inverse) /
                                                (inverse * (product_bound + 8 * eps * std::fabs(product))));
    const bool through_stats = test.training && test.norm;
    for (int64_t n = 0; n < N; ++n)
      for (int64_t i = 0; i < HW; ++i) {
        const int64_t at = test.index(n, c, i), j = n * HW + i;
        const Real centered = y.at(at) - m;
        const Real mean_dz = through_stats ? sum / M : 0, slope = through_stats ? product * inverse * inverse / M : 0;
        const Real dy = scale * (dz[j] - mean_dz - centered * slope);
        Real bound = dz_bound[j] + 8 * eps * (std::fabs(dz[j]) + std::fabs(mean_dz) + std::fabs(centered * slope));
        if (through_stats) {
          bound += sum_bound / M + std::fabs(centered) * inverse * inverse * product_bound / M;
        }
        const Real tiny = 1e-7L * (dtype == DType::kFloat16) + 1e-30L;  // float16's subnormals
        bound = (1 + store) * std::fabs(scale) * bound + store * std::fabs(dy) * (1 + bound) + tiny;
        worst_dy = std::max(worst_dy, std::fabs(got.dy.at(at) - dy) / bound);
        if (test.residual) {
          worst_dy = std::max(worst_dy, std::fabs(got.dresidual.at(at) - dz[j]) /
                                            (dz_bound[j] * (1 + store) + store * std::fabs(dz[j]) + tiny));
        }
      }
  }
  check(worst_out <= 1, isa + " out " + std::to_string(worst_out) + " x bound: " + test.name());
  check(worst_dy <= 1, isa + " dy " + std::to_string(worst_dy) + " x bound: " + test.name());
  check(worst_channel <= 1,
        isa + " statistics or dgamma, dbeta " + std::to_string(worst_channel) + " x bound: " + test.name());
}

// What squeeze and excitation is made of. The sums over what comes back are those that bn_act_and_sums finds of it.
void test_gates(const BatchNorm& table, const Shape& shape, DType dtype, Activation activation,
                const std::string& isa) {
  const auto [N, C, HW] = shape;
  const int64_t size = N * C * HW;
  const DType compute = compute_dtype(dtype);
  const Real eps = epsilon(compute), store = dtype == compute ? 0 : epsilon(dtype);
  const std::string name = isa + " gates " + name_of(dtype) + " n=" + std::to_string(N) + " c=" + std::to_string(C) +
                           " hw=" + std::to_string(HW) + " activation=" + std::to_string(static_cast<int>(activation));
  std::mt19937 random(13);
  std::normal_distribution<double> normal;
  auto fill = [&](int64_t count, DType type, double scale, double shift) {
    Buffer b(count, type);
    for (int64_t i = 0; i < count; ++i) b.set(i, normal(random) * scale + shift);
    return b;
  };
  const Buffer y = fill(size, dtype, 1, 0), dout = fill(size, dtype, 1, 0), gates = fill(N * C, compute, 1, 0);
  const Buffer shifts = fill(N * C, compute, 0.1, 0), mean = fill(C, compute, 0.1, 0), beta = fill(C, compute, 1, 0);
  Buffer var(C, compute);
  for (int64_t c = 0; c < C; ++c) var.set(c, 0.5 + c % 3);
  BatchNormArgs args{N, C, HW, Layout::kNHWC, dtype, y.data()};
  args.mean = mean.data(), args.var = var.data(), args.beta = beta.data();
  args.eps = 1e-5, args.activation = activation;
  std::vector<double> workspace((table.workspace(args) + 7) / 8);
  Buffer means(N * C, compute), dgates(N * C, compute), out(size, dtype), da(size, dtype);
  std::vector<double> sums(2 * C), expected(2 * C);
  const auto run = [&](int threads) {
    const Parallel parallel = parallel_with(threads);
    table.image_sums(parallel, args, nullptr, 1.0 / static_cast<double>(HW), means.data(), workspace.data());
    table.image_sums(parallel, args, dout.data(), 1, dgates.data(), workspace.data());
    table.gated(parallel, args, gates.data(), out.data(), workspace.data());
    table.gated_backward(parallel, args, dout.data(), {gates.data(), shifts.data()}, da.data(), sums.data(),
                         workspace.data());
  };
  run(3);
  const Buffer former_means = means, former_dgates = dgates, former_out = out, former_da = da;
  const std::vector<double> former_sums = sums;
  run(1);
  check(former_means.bytes == means.bytes && former_dgates.bytes == dgates.bytes && former_out.bytes == out.bytes &&
            former_da.bytes == da.bytes && former_sums == sums,
        name + " depends on the threads");
  if (dtype == compute) {
    Buffer a(size, dtype), dz(size, dtype);
    table.bn_act_and_sums(parallel_with(1), args, da.data(), a.data(), {expected.data(), dz.data()}, workspace.data());
    for (int64_t c = 0; c < C; ++c) {  // sums of the same terms in another order
      Real terms = 0, products = 0;
      for (int64_t i = 0; i < N * HW; ++i) {
        const Real most = Real(1.2L) * std::fabs(da.at(i * C + c));  // of an activation's slope
        terms += most, products += most * std::fabs(y.at(i * C + c) - mean.at(c));
      }
      const Real growth = 2 * eps * (std::sqrt(Real(N * HW)) + 4);
      check(std::fabs(sums[c] - expected[c]) <= growth * terms, name + " sums");
      check(std::fabs(sums[C + c] - expected[C + c]) <= growth * products, name + " sums of products");
    }
  }
  Real worst = 0;  // error over bound
  for (int64_t n = 0; n < N; ++n)
    for (int64_t c = 0; c < C; ++c) {
      const Real scale = 1 / std::sqrt(var.at(c) + Real(1e-5)), gate = gates.at(n * C + c), more = shifts.at(n * C + c);
      Real sum = 0, sum_bound = 1e-30L, product = 0, product_bound = 1e-30L;
      for (int64_t i = 0; i < HW; ++i) {
        const int64_t at = (n * HW + i) * C + c;
        const Real normed = (y.at(at) - mean.at(c)) * scale, z = normed + beta.at(c), a = forward(activation, z);
        const Real a_bound =
            12 * eps * (std::fabs(normed) + std::fabs(Real(beta.at(c)))) + 16 * eps * (std::fabs(z) + std::fabs(a));
        sum += a, sum_bound += a_bound, product += a * dout.at(at), product_bound += a_bound * std::fabs(dout.at(at));
        // A chain of HW sums, each of which may be as large as all terms together.
        sum_bound += std::sqrt(Real(HW)) * eps * std::fabs(a);
        product_bound += std::sqrt(Real(HW)) * eps * std::fabs(a * dout.at(at));
        const Real tiny = 1e-7L * (dtype == DType::kFloat16) + 1e-30L;
        const Real out_bound = (a_bound * std::fabs(gate) + eps * std::fabs(a * gate)) * (1 + store);
        worst = std::max(worst, std::fabs(out.at(at) - a * gate) / (out_bound + store * std::fabs(a * gate) + tiny));
        const Real incoming = dout.at(at) * gate + more;
        const Real terms = std::fabs(dout.at(at) * gate) + std::fabs(more);
        worst =
            std::max(worst, std::fabs(da.at(at) - incoming) / (2 * eps * terms + store * std::fabs(incoming) + tiny));
      }
      worst = std::max(worst, std::fabs(means.at(n * C + c) * HW - sum) / (sum_bound + 4 * eps * std::fabs(sum)));
      worst =
          std::max(worst, std::fabs(dgates.at(n * C + c) - product) / (product_bound + 4 * eps * std::fabs(product)));
    }
  check(worst <= 1, name + " " + std::to_string(worst) + " x bound");
}

void nan_stays_where_it_is(const BatchNorm& table, const std::string& isa) {
  for (int a = 0; a < 6; ++a) {
    std::vector<float> y(70, 1.0f), out(70);
    y[33] = NAN;
    BatchNormArgs args{1,       7,       10,      Layout::kNHWC, DType::kFloat32,           y.data(), nullptr, nullptr,
                       nullptr, nullptr, nullptr, 1e-5,          static_cast<Activation>(a)};
    std::vector<double> workspace(table.workspace(args) / 8 + 1);
    table.bn_act(parallel_with(1), args, out.data(), workspace.data());
    for (int i = 0; i < 70; ++i) {
      check(std::isnan(out[i]) == (i == 33), isa + " NaN through activation " + std::to_string(a));
    }
  }
}

void test_batch_norm(const NamedIsa& isa) {
  const BatchNorm& table = batch_norm_for(isa.isa);
  const Shape shapes[] = {{1, 1, 1}, {2, 16, 49}, {3, 37, 25}, {1, 130, 9}, {5, 3, 700}, {200, 5, 1}, {2, 20, 4099}};
  int count = 0;
  for (const Shape& shape : shapes)
    for (Layout layout : {Layout::kNCHW, Layout::kNHWC})
      for (int dtype = 0; dtype < 4; ++dtype)
        for (int activation = 0; activation < 6; ++activation) {
          const int i = count++ * 7;  // walks through the combinations of the flags
          const bool norm = i % 4 != 0, large = shape.hw > 1000;
          if (large && activation > 1) continue;
          for (bool training : {false, true}) {
            test_batch_norm_case(table,
                                 {shape, layout, static_cast<DType>(dtype), static_cast<Activation>(activation), norm,
                                  i / 2 % 2 == 0, i / 3 % 2 == 0, training, 0},
                                 isa.name);
          }
        }
  for (Layout layout : {Layout::kNCHW, Layout::kNHWC})  // mean_far_from_zero
    for (DType dtype : {DType::kFloat32, DType::kFloat64})
      test_batch_norm_case(table, {{4, 19, 900}, layout, dtype, Activation::identity, true, true, false, true, 1e4},
                           isa.name);
  for (const Shape& shape : {Shape{2, 16, 49}, {3, 37, 25}, {5, 3, 700}, {40, 5, 1}, {2, 20, 4099}})
    for (int dtype = 0; dtype < 4; ++dtype)
      for (Activation activation : {Activation::silu, Activation::hardswish, Activation::relu})
        test_gates(table, shape, static_cast<DType>(dtype), activation, isa.name);
  nan_stays_where_it_is(table, isa.name);
}

}  // namespace
}  // namespace convext

int main() {
  for (const convext::testing::NamedIsa& isa : convext::testing::instruction_sets(convext::detect_cpu_isa())) {
    convext::test_staging(isa);
    convext::test_batch_norm(isa);
  }
  return convext::testing::summary();
}
