// The torch-facing side of the batch-norm passes on the CPU: checks, allocation, staging of odd strides. The kernels
// (csrc/cpu/kernels/elementwise/batch_norm.cpp) read every dtype as it is stored, in either layout.
#include <cmath>
#include <tuple>

#include "core/select.h"
#include "cpu/kernels/elementwise/batch_norm.h"
#include "cpu/kernels/elementwise/staging.h"
#include "torch_glue.h"

namespace convext {
namespace {

// The layout the pass runs in is the one y suggests, and the results have it too. Where y lies dense in both (one
// pixel), the same memory is read as NHWC, which has the longer rows.
Layout layout_of(const View& y) {
  return y.suggests_nhwc() || y.is_dense(Layout::kNHWC) ? Layout::kNHWC : Layout::kNCHW;
}

Tensor empty_like(const View& y) {
  return empty_activation(y.size[0], y.size[1], y.size[2], y.size[3], y.dtype, y.suggests_nhwc());
}

// An operand dense in `layout`: itself, or a copy.
struct Dense {
  View view;
  Layout layout;
  bool staged;

  Dense(const View& v, Layout wanted) : view(v), layout(wanted), staged(!v.is_dense(wanted)) {}

  int64_t scratch_bytes() const { return staged ? Scratch::padded(view.numel() * dtype_size(view.dtype)) : 0; }

  const void* get(const Staging& staging, const Parallel& parallel) const {
    if (!staged) return view.data;
    const int64_t c = view.size[1], h = view.size[2], w = view.size[3];
    const int64_t nhwc[4] = {c * h * w, 1, w * c, c}, nchw[4] = {c * h * w, h * w, w, 1};
    void* copy = scratch().take(scratch_bytes());
    staging.copy(parallel, view.data, view.dtype, view.stride, copy, view.dtype, layout == Layout::kNHWC ? nhwc : nchw,
                 view.size);
    return copy;
  }
};

View matching_view(const Tensor& t, const char* name, const View& y) {
  const View v = view_of(t, name);
  STD_TORCH_CHECK(v.dtype == y.dtype, "convext_cpu: ", name, " must have y's dtype");
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(v.size[i] == y.size[i], "convext_cpu: ", name, " must have y's shape");
  }
  return v;
}

BatchNormArgs args_of(const View& y, Layout layout) {
  BatchNormArgs args{};
  args.n = y.size[0], args.c = y.size[1], args.hw = y.size[2] * y.size[3];
  args.layout = layout;
  args.dtype = y.dtype;
  return args;
}

// The per-channel parameters in the compute dtype.
struct Channels {
  const OptionalTensor &mean, &var, &gamma, &beta;
  double eps;
  int64_t activation;

  int64_t scratch_bytes(const BatchNormArgs& args) const {
    const int64_t split = splits(args) ? Scratch::padded(args.c * sizeof(double)) : 0;
    return 5 * Scratch::padded(args.c * dtype_size(compute_dtype(args.dtype))) + split;
  }

  // Whether the mean has more digits than the compute dtype, as batch_stats returns it.
  bool splits(const BatchNormArgs& args) const {
    return mean && compute_dtype(args.dtype) == DType::kFloat32 && dtype_of(*mean) == DType::kFloat64;
  }

  void load_split_mean(BatchNormArgs& args) const {
    auto* const exact = static_cast<double*>(scratch().take(args.c * sizeof(double)));
    auto* const rounded = static_cast<float*>(scratch().take(args.c * sizeof(float)));
    auto* const rest = static_cast<float*>(scratch().take(args.c * sizeof(float)));
    load_channels<double>(mean, "mean", args.c, 0.0, exact);
    for (int64_t c = 0; c < args.c; ++c) {
      rounded[c] = static_cast<float>(exact[c]);
      const double more = exact[c] - rounded[c];
      rest[c] = std::isfinite(more) ? static_cast<float>(more) : 0.0f;
    }
    args.mean = rounded, args.mean_rest = rest;
  }

  void load(BatchNormArgs& args) const {
    STD_TORCH_CHECK(mean.has_value() == var.has_value(), "convext_cpu: mean and var come together or not at all");
    const auto one = [&](const OptionalTensor& t, const char* name) -> const void* {
      if (!t) return nullptr;
      void* out = scratch().take(args.c * dtype_size(compute_dtype(args.dtype)));
      if (compute_dtype(args.dtype) == DType::kFloat64) {
        load_channels<double>(t, name, args.c, 0.0, static_cast<double*>(out));
      } else {
        load_channels<float>(t, name, args.c, 0.0f, static_cast<float*>(out));
      }
      return out;
    };
    if (splits(args)) {
      load_split_mean(args);
    } else {
      args.mean = one(mean, "mean");
    }
    args.var = one(var, "var");
    args.gamma = one(gamma, "gamma"), args.beta = one(beta, "beta");
    args.eps = eps;
    args.activation = static_cast<Activation>(activation);
  }
};

std::tuple<Tensor, Tensor> batch_stats(const Tensor& y) {
  const View yv = view_of(y, "y");
  const Dense dense(yv, layout_of(yv));
  BatchNormArgs args = args_of(yv, dense.layout);
  Tensor mean = empty_vector(args.c, DType::kFloat64), var = empty_vector(args.c, compute_dtype(yv.dtype));
  const BatchNorm& kernels = batch_norm_for(settings().cpu_isa);
  const int64_t workspace = kernels.workspace(args);
  const ScratchScope scope(dense.scratch_bytes() + Scratch::padded(workspace));
  const Parallel& parallel = torch_parallel();
  args.y = dense.get(staging_for(settings().cpu_isa), parallel);
  auto* const means = static_cast<double*>(mean.data_ptr());
  kernels.batch_stats(parallel, args, means, var.data_ptr(), scratch().take(workspace));
  return {mean, var};
}

Tensor bn_act(const Tensor& y, const OptionalTensor& mean, const OptionalTensor& var, const OptionalTensor& gamma,
              const OptionalTensor& beta, const OptionalTensor& residual, double eps, int64_t activation) {
  const View yv = view_of(y, "y");
  const Dense dense(yv, layout_of(yv));
  BatchNormArgs args = args_of(yv, dense.layout);
  Tensor out = empty_like(yv);
  if (yv.numel() == 0) return out;
  std::optional<Dense> addend;
  if (residual) addend.emplace(matching_view(*residual, "residual", yv), dense.layout);
  const Channels channels{mean, var, gamma, beta, eps, activation};
  const BatchNorm& kernels = batch_norm_for(settings().cpu_isa);
  const int64_t workspace = kernels.workspace(args);
  const ScratchScope scope(dense.scratch_bytes() + (addend ? addend->scratch_bytes() : 0) +
                           channels.scratch_bytes(args) + Scratch::padded(workspace));
  const Parallel& parallel = torch_parallel();
  const Staging& staging = staging_for(settings().cpu_isa);
  channels.load(args);
  args.y = dense.get(staging, parallel);
  args.residual = addend ? addend->get(staging, parallel) : nullptr;
  kernels.bn_act(parallel, args, out.data_ptr(), scratch().take(workspace));
  return out;
}

// dresidual is of size 0 where there is no residual.
std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward(const Tensor& dout, const Tensor& y,
                                                           const OptionalTensor& mean, const OptionalTensor& var,
                                                           const OptionalTensor& gamma, const OptionalTensor& beta,
                                                           const OptionalTensor& residual, double eps,
                                                           int64_t activation, bool training) {
  const View yv = view_of(y, "y");
  const Dense dense(yv, layout_of(yv)), incoming(matching_view(dout, "dout", yv), dense.layout);
  BatchNormArgs args = args_of(yv, dense.layout);
  Tensor dy = empty_like(yv), dresidual = residual ? empty_like(yv) : empty_vector(0, yv.dtype);
  const DType compute = compute_dtype(yv.dtype);
  Tensor dgamma = empty_vector(args.c, compute), dbeta = empty_vector(args.c, compute);
  if (yv.numel() == 0) return {dy, torch::stable::zero_(dgamma), torch::stable::zero_(dbeta), dresidual};
  std::optional<Dense> addend;
  if (residual) addend.emplace(matching_view(*residual, "residual", yv), dense.layout);
  const Channels channels{mean, var, gamma, beta, eps, activation};
  const BatchNorm& kernels = batch_norm_for(settings().cpu_isa);
  const int64_t workspace = kernels.workspace(args);
  const ScratchScope scope(dense.scratch_bytes() + incoming.scratch_bytes() + (addend ? addend->scratch_bytes() : 0) +
                           channels.scratch_bytes(args) + Scratch::padded(workspace));
  const Parallel& parallel = torch_parallel();
  const Staging& staging = staging_for(settings().cpu_isa);
  channels.load(args);
  args.y = dense.get(staging, parallel);
  args.residual = addend ? addend->get(staging, parallel) : nullptr;
  BatchNormGradients gradients{};
  gradients.dout = incoming.get(staging, parallel);
  gradients.dy = dy.data_ptr();
  gradients.dgamma = dgamma.data_ptr();
  gradients.dbeta = dbeta.data_ptr();
  gradients.dresidual = residual ? dresidual.data_ptr() : nullptr;
  gradients.training = training;
  kernels.bn_act_backward(parallel, args, gradients, scratch().take(workspace));
  return {dy, dgamma, dbeta, dresidual};
}

// What bn_act_and_sums and bn_act_from_sums share: y and the parameters, in scratch memory.
struct Chained {
  View yv;
  Dense dense, incoming;
  BatchNormArgs args;
  Channels channels;
  const BatchNorm& kernels;
  int64_t workspace;

  Chained(const Tensor& dout, const Tensor& y, const Channels& given)
      : yv(view_of(y, "y")),
        dense(yv, layout_of(yv)),
        incoming(matching_view(dout, "dout", yv), dense.layout),
        args(args_of(yv, dense.layout)),
        channels(given),
        kernels(batch_norm_for(settings().cpu_isa)),
        workspace(kernels.workspace(args)) {}

  int64_t scratch_bytes() const {
    return dense.scratch_bytes() + incoming.scratch_bytes() + channels.scratch_bytes(args) + Scratch::padded(workspace);
  }

  // Returns dout.
  const void* load(const Parallel& parallel) {
    const Staging& staging = staging_for(settings().cpu_isa);
    channels.load(args);
    args.y = dense.get(staging, parallel);
    return incoming.get(staging, parallel);
  }
};

// dz is of size 0 where it is not kept.
std::tuple<Tensor, Tensor, Tensor> bn_act_and_sums(const Tensor& dout, const Tensor& y, const Tensor& mean,
                                                   const Tensor& var, const OptionalTensor& gamma,
                                                   const OptionalTensor& beta, double eps, int64_t activation) {
  const OptionalTensor given_mean(mean), given_var(var);
  Chained call(dout, y, {given_mean, given_var, gamma, beta, eps, activation});
  const ScratchScope scope(call.scratch_bytes());
  const Parallel& parallel = torch_parallel();
  const void* incoming = call.load(parallel);
  const bool keeps = call.kernels.keeps_dz(call.args);
  Tensor out = empty_like(call.yv), dz = keeps ? empty_like(call.yv) : empty_vector(0, call.yv.dtype);
  Tensor sums = empty_vector(2 * call.args.c, DType::kFloat64);
  const BatchNormSums found{static_cast<double*>(sums.data_ptr()), dz.data_ptr()};
  call.kernels.bn_act_and_sums(parallel, call.args, incoming, out.data_ptr(), found, scratch().take(call.workspace));
  return {out, sums, dz};
}

// Where dz is of y's size, dy is computed over it, and what is returned in its place is of size 0.
std::tuple<Tensor, Tensor, Tensor> bn_act_from_sums(const Tensor& dout, const Tensor& y, const Tensor& mean,
                                                    const Tensor& var, const OptionalTensor& gamma,
                                                    const OptionalTensor& beta, double eps, int64_t activation,
                                                    const Tensor& sums, const Tensor& dz) {
  const OptionalTensor given_mean(mean), given_var(var);
  Chained call(dout, y, {given_mean, given_var, gamma, beta, eps, activation});
  const ScratchScope scope(call.scratch_bytes());
  const Parallel& parallel = torch_parallel();
  BatchNormGradients gradients{};
  gradients.dout = call.load(parallel);
  const bool keeps = call.kernels.keeps_dz(call.args);
  STD_TORCH_CHECK(dz.numel() == (keeps ? call.yv.numel() : 0) && sums.numel() == 2 * call.args.c,
                  "convext_cpu: sums and dz must be what bn_act_and_sums returned");
  Tensor dy = keeps ? empty_vector(0, call.yv.dtype) : empty_like(call.yv);
  const DType compute = compute_dtype(call.yv.dtype);
  Tensor dgamma = empty_vector(call.args.c, compute), dbeta = empty_vector(call.args.c, compute);
  gradients.dy = keeps ? dz.data_ptr() : dy.data_ptr();
  gradients.dgamma = dgamma.data_ptr();
  gradients.dbeta = dbeta.data_ptr();
  gradients.training = true;
  call.kernels.bn_act_from_sums(parallel, call.args, gradients, static_cast<const double*>(sums.data_ptr()),
                                scratch().take(call.workspace));
  return {dy, dgamma, dbeta};
}

}  // namespace
}  // namespace convext

STABLE_TORCH_LIBRARY_FRAGMENT(convext_cpu, m) {
  m.def("batch_stats(Tensor y) -> (Tensor mean, Tensor var)");
  m.def(
      "bn_act(Tensor y, Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, Tensor? residual, float eps, "
      "int activation) -> Tensor");
  m.def(
      "bn_act_backward(Tensor dout, Tensor y, Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, "
      "Tensor? residual, float eps, int activation, bool training) "
      "-> (Tensor dy, Tensor dgamma, Tensor dbeta, Tensor dresidual)");
  m.def(
      "bn_act_and_sums(Tensor dout, Tensor y, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, float eps, "
      "int activation) -> (Tensor out, Tensor sums, Tensor dz)");
  m.def(
      "bn_act_from_sums(Tensor dout, Tensor y, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, float eps, "
      "int activation, Tensor sums, Tensor(a!) dz) -> (Tensor dy, Tensor dgamma, Tensor dbeta)");
}

STABLE_TORCH_LIBRARY_IMPL(convext_cpu, CPU, m) {
  m.impl("batch_stats", TORCH_BOX(&convext::batch_stats));
  m.impl("bn_act", TORCH_BOX(&convext::bn_act));
  m.impl("bn_act_backward", TORCH_BOX(&convext::bn_act_backward));
  m.impl("bn_act_and_sums", TORCH_BOX(&convext::bn_act_and_sums));
  m.impl("bn_act_from_sums", TORCH_BOX(&convext::bn_act_from_sums));
}
