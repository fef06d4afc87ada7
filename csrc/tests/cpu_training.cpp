// Stand-alone test of training.h: a convolution between two batch norms, a piece of the batch at a time, against the
// same passes one by one, bit for bit but for dw, which is compared with a sum in long double. Every kernel of every
// instruction set that this CPU has, in float32 and float64. No torch. Exits non-zero on failure.
#include <algorithm>
#include <cmath>

#include "core/select.h"
#include "cpu/runtime/training.h"
#include "harness.h"

namespace convext {
namespace {

using testing::Buffer;
using testing::check;

struct Values {
  DType dtype;
  int64_t count;
  Buffer buffer;

  Values(DType type, int64_t size) : dtype(type), count(size), buffer(size * dtype_size(type)) {}
  Values(DType type, int64_t size, float scale, float shift) : Values(type, size) {
    const std::vector<float> values = testing::random_values(size);
    for (int64_t i = 0; i < size; ++i) set(i, values[i] * scale + shift);
  }
  void* data() { return buffer.data.get(); }
  void set(int64_t i, double v) {
    if (dtype == DType::kFloat64) {
      static_cast<double*>(data())[i] = v;
    } else {
      static_cast<float*>(data())[i] = static_cast<float>(v);
    }
  }
  double at(int64_t i) {
    return dtype == DType::kFloat64 ? static_cast<double*>(data())[i] : static_cast<float*>(data())[i];
  }
  bool operator==(Values& o) { return std::memcmp(data(), o.data(), count * dtype_size(dtype)) == 0; }
};

// A batch norm over y, its parameters, and its own workspace.
struct Norm {
  Values y, mean, var, gamma, beta, rest;
  BatchNormArgs args{};

  Norm(DType dtype, int64_t n, int64_t c, int64_t hw, Activation activation)
      : y(dtype, n * c * hw, 1, 0.3f),
        mean(dtype, c, 0.2f, 0.3f),
        var(dtype, c, 0.3f, 0.6f),
        gamma(dtype, c, 0.5f, 1),
        beta(dtype, c, 1, 0),
        rest(dtype, c, 1e-9f, 0) {
    args.n = n, args.c = c, args.hw = hw, args.layout = Layout::kNHWC, args.dtype = dtype, args.y = y.data();
    args.mean = mean.data(), args.var = var.data(), args.gamma = gamma.data(), args.beta = beta.data();
    args.eps = 1e-5, args.activation = activation, args.mean_rest = rest.data();
  }
};

struct Weights {
  Values dense;
  Buffer packed;
  const void* given;

  Weights(const Variant& variant, const ConvProblem& p, Values& w)
      : dense(p.dtype, p.w_size()), packed(variant.pack_format && variant.pack_format(p) ? variant.packed_size(p) : 1) {
    std::memcpy(dense.data(), w.data(), p.w_size() * dtype_size(p.dtype));
    given = dense.data();
    if (variant.pack_format && variant.pack_format(p)) {
      variant.pack(p, dense.data(), packed.data.get(), testing::kSerial);
      given = packed.data.get();
    }
  }
  WeightSource source() {
    return {[](const void* context, const Parallel&, void*) { return context; }, dense.data()};
  }
};

void launch(const Variant& variant, const ConvProblem& p, const void* a, const void* b, WeightSource source, void* out,
            const void* shift = nullptr) {
  Buffer workspace(variant.workspace ? variant.workspace(p, 1) : 1);
  LaunchArgs args{};
  args.a = a, args.b = b, args.out = out, args.weights = source;
  args.epilogue.shift = shift;
  args.workspace = workspace.data.get();
  args.parallel = &testing::kSerial;
  const char* why = variant.launch(p, args);
  check(why == nullptr, std::string(variant.name) + ": " + (why ? why : ""));
}

struct Case {
  ConvProblem p;
  Activation activation;
};

ConvProblem problem(DType dtype, int n, int c, int h, int w, int k, int r, int stride, int groups = 1) {
  ConvProblem p{};
  p.n = n, p.c = c, p.h = h, p.w = w, p.k = k, p.r = p.s = r;
  p.stride_h = p.stride_w = stride, p.pad_h = p.pad_w = r / 2, p.dil_h = p.dil_w = 1, p.groups = groups;
  p.dtype = dtype, p.x_layout = p.y_layout = Layout::kNHWC;
  return p;
}

std::vector<const Variant*> serving(Pass pass, const ConvProblem& p, Isa isa) {
  std::vector<const Variant*> found;
  for (const Variant* v : variants()) {
    if (v->isa == isa && v->dtype == p.dtype && reject(*v, Device::kCPU, pass, p) == nullptr) found.push_back(v);
  }
  return found;
}

std::string name_of(const Variant& v, const Case& test, int threads) {
  const ConvProblem& p = test.p;
  std::string name = v.name;
  for (int extent : {p.n, p.c, p.h, p.w, p.k, p.r, p.stride_h, p.groups}) name += " " + std::to_string(extent);
  return name + " activation=" + std::to_string(static_cast<int>(test.activation)) +
         " threads=" + std::to_string(threads);
}

void test_fprop(const Case& test, const BatchNorm& kernels, Isa isa) {
  const ConvProblem& p = test.p;
  const int64_t hw = int64_t{p.h} * p.w, pq = int64_t{p.p()} * p.q();
  Norm input(p.dtype, p.n, p.c, hw, test.activation);
  Values w(p.dtype, p.w_size(), 1, 0), bias(p.dtype, p.k, 1, 3);
  Values x(p.dtype, p.x_size());
  Buffer norm_workspace(kernels.workspace(input.args));
  kernels.bn_act(testing::kSerial, input.args, x.data(), norm_workspace.data.get());
  for (const Variant* variant : serving(Pass::kFprop, p, isa)) {
    Weights weights(*variant, p, w);
    Values y(p.dtype, p.y_size()), var(p.dtype, p.k), mean(DType::kFloat64, p.k);
    launch(*variant, p, x.data(), weights.given, weights.source(), y.data(), bias.data());
    BatchNormArgs output{};
    output.n = p.n, output.c = p.k, output.hw = pq, output.layout = Layout::kNHWC, output.dtype = p.dtype;
    output.y = y.data();
    Buffer output_workspace(kernels.workspace(output));
    kernels.batch_stats(testing::kSerial, output, static_cast<double*>(mean.data()), var.data(),
                        output_workspace.data.get());
    for (int threads : {1, 3}) {
      for (const bool normed : {false, true}) {
        const std::string name = name_of(*variant, test, threads) + (normed ? " normed" : "");
        Values found(p.dtype, p.y_size()), found_var(p.dtype, p.k), found_mean(DType::kFloat64, p.k);
        FpropStats call{};
        call.variant = variant, call.problem = p;
        call.args.a = normed ? nullptr : x.data();
        call.args.b = weights.given, call.args.weights = weights.source(), call.args.out = found.data();
        call.args.epilogue.shift = bias.data();
        call.input = normed ? &input.args : nullptr;
        call.output = output, call.output.y = found.data();
        call.mean = static_cast<double*>(found_mean.data()), call.var = found_var.data();
        Buffer workspace(fprop_stats_workspace(call, kernels, threads));
        const char* why = fprop_stats(call, kernels, workspace.data.get(), testing::parallel_with(threads));
        check(why == nullptr, name + " runs");
        check(found == y, name + " y");
        check(found_mean == mean && found_var == var, name + " statistics");
      }
    }
  }
}

// dw in long double, and of each element the sum of its products' magnitudes.
void exact_wgrad(const ConvProblem& p, Values& dy, Values& x, std::vector<long double>& dw,
                 std::vector<long double>& sizes) {
  dw.assign(p.w_size(), 0), sizes.assign(p.w_size(), 0);
  const int cg = p.c_per_group(), kg = p.k_per_group();
  for (int n = 0; n < p.n; ++n) {
    for (int i = 0; i < p.p() * p.q(); ++i) {
      for (int k = 0; k < p.k; ++k) {
        const long double d = dy.at((int64_t{n} * p.p() * p.q() + i) * p.k + k);
        for (int r = 0; r < p.r; ++r) {
          for (int s = 0; s < p.s; ++s) {
            const int h = p.h_of(i / p.q(), r), column = p.w_of(i % p.q(), s);
            if (h < 0 || h >= p.h || column < 0 || column >= p.w) continue;
            for (int c = 0; c < cg; ++c) {
              const long double v = x.at(((int64_t{n} * p.h + h) * p.w + column) * p.c + k / kg * cg + c);
              const int64_t at = ((int64_t{k} * cg + c) * p.r + r) * p.s + s;
              dw[at] += d * v, sizes[at] += std::fabs(d * v);
            }
          }
        }
      }
    }
  }
}

// What a kernel's dw may be off by: as cpu_variants.cpp has it.
bool is_close(const ConvProblem& p, const Variant& wgrad, Values& dw, const std::vector<long double>& exact,
              const std::vector<long double>& sizes) {
  const double eps = std::ldexp(1.0, p.dtype == DType::kFloat64 ? -52 : -23);
  const double relative = 2 * (wgrad.tile == 4 ? 26.3 / 9 : 1.0) * eps * (std::sqrt(static_cast<double>(p.npq())) + 4);
  const bool mixes = wgrad.algorithm == Algorithm::winograd;
  const long double largest = *std::max_element(sizes.begin(), sizes.end());
  for (int64_t i = 0; i < p.w_size(); ++i) {
    if (!(std::fabs(dw.at(i) - exact[i]) <= relative * (mixes ? largest : sizes[i]))) return false;
  }
  return true;
}

void test_gradients(const Case& test, const BatchNorm& kernels, const WgradSum& sum, Isa isa) {
  const ConvProblem& p = test.p;
  const int64_t hw = int64_t{p.h} * p.w, pq = int64_t{p.p()} * p.q();
  Norm input(p.dtype, p.n, p.c, hw, test.activation), output(p.dtype, p.n, p.k, pq, test.activation);
  Values w(p.dtype, p.w_size(), 1, 0), dout(p.dtype, p.y_size(), 1, 0);
  Values x(p.dtype, p.x_size()), dy(p.dtype, p.y_size()), dgamma(p.dtype, p.k), dbeta(p.dtype, p.k);
  Values sums(DType::kFloat64, 2 * p.k), out(p.dtype, p.y_size()), dz(p.dtype, p.y_size());
  Buffer in_workspace(kernels.workspace(input.args)), out_workspace(kernels.workspace(output.args));
  kernels.bn_act(testing::kSerial, input.args, x.data(), in_workspace.data.get());
  BatchNormGradients wanted{};
  wanted.dout = dout.data(), wanted.dy = dy.data(), wanted.dgamma = dgamma.data(), wanted.dbeta = dbeta.data();
  wanted.training = true;
  kernels.bn_act_backward(testing::kSerial, output.args, wanted, out_workspace.data.get());
  kernels.bn_act_and_sums(testing::kSerial, output.args, dout.data(), out.data(),
                          {static_cast<double*>(sums.data()), dz.data()}, out_workspace.data.get());
  // A compiler may contract dy's arithmetic otherwise than in the pass over all of it.
  Values whole(p.dtype, p.y_size());
  std::memcpy(whole.data(), dy.data(), p.y_size() * dtype_size(p.dtype));
  kernels.load_gradient(output.args, wanted, static_cast<const double*>(sums.data()), out_workspace.data.get());
  kernels.gradient(output.args, output.y.data(), dout.data(), p.npq(), dy.data(), out_workspace.data.get());
  bool close = true;
  for (int64_t i = 0; i < p.y_size(); ++i) {  // of terms up to 8, in five steps
    close &= std::fabs(dy.at(i) - whole.at(i)) <= 5 * 8 * std::ldexp(1.0, p.dtype == DType::kFloat64 ? -53 : -24);
  }
  check(close, "dy of pieces " + std::to_string(p.c) + " to " + std::to_string(p.k));
  std::vector<long double> exact, sizes;
  exact_wgrad(p, dy, x, exact, sizes);
  const std::vector<const Variant*> wgrads = serving(Pass::kWgrad, p, isa);
  for (const Variant* dgrad : serving(Pass::kDgrad, p, isa)) {
    Weights weights(*dgrad, p, w);
    Values dx(p.dtype, p.x_size()), in_sums(DType::kFloat64, 2 * p.c);
    launch(*dgrad, p, dy.data(), weights.given, weights.source(), dx.data());
    Values in_out(p.dtype, p.x_size()), in_dz(p.dtype, p.x_size());
    kernels.bn_act_and_sums(testing::kSerial, input.args, dx.data(), in_out.data(),
                            {static_cast<double*>(in_sums.data()), in_dz.data()}, in_workspace.data.get());
    for (const Variant* wgrad : wgrads) {
      if (dgrad != serving(Pass::kDgrad, p, isa)[0] && wgrad != wgrads[0]) continue;  // each with one of the others
      Values first_dw(p.dtype, p.w_size());
      for (int threads : {1, 3}) {
        for (int way = 0; way < 4; ++way) {
          const bool normed = way != 0, sums_up = way == 1, given = way == 2;
          const std::string name = name_of(*dgrad, test, threads) + " " + wgrad->name + " way=" + std::to_string(way);
          Values found_dx(p.dtype, p.x_size()), found_dw(p.dtype, p.w_size()), found_dgamma(p.dtype, p.k);
          Values found_dbeta(p.dtype, p.k), found_sums(DType::kFloat64, 2 * p.c);
          BatchNormConvGradients call{};
          call.dgrad = dgrad, call.wgrad = wgrad, call.problem = p;
          call.weights = weights.given, call.source = weights.source();
          call.dout = dout.data(), call.output = output.args;
          call.sums = given ? static_cast<const double*>(sums.data()) : nullptr;
          call.dgamma = found_dgamma.data(), call.dbeta = found_dbeta.data();
          call.x = normed ? nullptr : x.data();
          call.input = normed ? &input.args : nullptr;
          call.input_sums = sums_up ? static_cast<double*>(found_sums.data()) : nullptr;
          call.dx = found_dx.data(), call.dw = found_dw.data();
          Buffer workspace(batch_norm_conv_gradients_workspace(call, kernels, sum, threads));
          const char* why =
              batch_norm_conv_gradients(call, kernels, sum, workspace.data.get(), testing::parallel_with(threads));
          check(why == nullptr, name + " runs");
          check(found_dx == dx, name + " dx");
          check(found_dgamma == dgamma && found_dbeta == dbeta, name + " dgamma, dbeta");
          check(is_close(p, *wgrad, found_dw, exact, sizes), name + " dw");
          if (way == 0 && threads == 1) std::memcpy(first_dw.data(), found_dw.data(), p.w_size() * dtype_size(p.dtype));
          check(found_dw == first_dw, name + " dw is the same by any number of threads and of x in either form");
          if (sums_up) check(found_sums == in_sums, name + " sums");
        }
      }
    }
  }
}

void test_isa(const testing::NamedIsa& isa) {
  const BatchNorm& kernels = batch_norm_for(isa.isa);
  const WgradSum& sum = wgrad_sum_for(isa.isa);
  for (const DType dtype : {DType::kFloat32, DType::kFloat64}) {
    const Case cases[] = {
        {problem(dtype, 5, 24, 30, 31, 40, 1, 1), Activation::relu6},  // pieces of pixels
        {problem(dtype, 2, 17, 9, 7, 5, 1, 1), Activation::silu},      // one chunk, no whole vectors
        {problem(dtype, 7, 200, 14, 14, 64, 1, 1), Activation::relu},  // chunks of parts of images
        {problem(dtype, 3, 32, 15, 15, 48, 1, 2), Activation::relu},   // by images, not all of x is read
        {problem(dtype, 5, 48, 21, 19, 48, 3, 1, 48), Activation::hardswish},
        {problem(dtype, 4, 20, 16, 17, 20, 5, 2, 20), Activation::silu},
        {problem(dtype, 3, 34, 12, 13, 36, 3, 1), Activation::gelu},
        {problem(dtype, 3, 16, 12, 13, 24, 3, 2, 2), Activation::identity},
        {problem(dtype, 1, 8, 1, 1, 8, 1, 1), Activation::relu},
    };
    for (const Case& test : cases) {
      test_fprop(test, kernels, isa.isa);
      test_gradients(test, kernels, sum, isa.isa);
    }
  }
}

}  // namespace
}  // namespace convext

int main() {
  using namespace convext;
  for (const testing::NamedIsa& isa : testing::instruction_sets(detect_cpu_isa())) {
    settings().cpu_isa = isa.isa;
    test_isa(isa);
  }
  return testing::summary();
}
