// The torch-facing side of the batch-norm passes on the CPU: checks, allocation, staging of odd strides. The kernels
// (csrc/cpu/kernels/elementwise/batch_norm.cpp) read every dtype as it is stored, in either layout.
#include <tuple>

#include "batch_norm_call.h"
#include "core/select.h"

namespace convext {
namespace {

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

// Where dz is of y's size, dy is computed over it, and what is returned in its place is of size 0. Where it is of size 0,
// dz is computed again, as who has the sums from elsewhere wants it.
std::tuple<Tensor, Tensor, Tensor> bn_act_from_sums(const Tensor& dout, const Tensor& y, const Tensor& mean,
                                                    const Tensor& var, const OptionalTensor& gamma,
                                                    const OptionalTensor& beta, double eps, int64_t activation,
                                                    const Tensor& sums, const Tensor& dz) {
  const OptionalTensor given_mean(mean), given_var(var);
  Chained call(dout, y, {given_mean, given_var, gamma, beta, eps, activation});
  const ScratchScope scope(call.scratch_bytes());
  const Parallel& parallel = torch_parallel();
  BatchNormGradients gradients{};
  const void* const incoming = call.load(parallel);
  const bool keeps = dz.numel() > 0;
  STD_TORCH_CHECK((!keeps || dz.numel() == call.yv.numel()) && sums.numel() == 2 * call.args.c,
                  "convext_cpu: sums and dz must be what bn_act_and_sums returned");
  gradients.dout = keeps ? nullptr : incoming;
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

// running = (1 - momentum) * running + momentum * batch, and of the variance by the factor that makes it unbiased.
void update_running(Tensor running_mean, Tensor running_var, const Tensor& mean, const Tensor& var, double momentum,
                    double unbiased) {
  const int64_t c = mean.numel();
  const auto update = [&](Tensor& running, const Tensor& batch, const char* name, double factor) {
    STD_TORCH_CHECK(running.is_cpu() && running.is_contiguous() && running.numel() == c, "convext_cpu: running ", name,
                    " must hold ", c, " values in a row on the CPU");
    std::vector<double> values(c);
    load_channels<double>(OptionalTensor(batch), name, c, 0.0, values.data());
    const auto apply = [&](auto* to) {
      using T = std::remove_pointer_t<decltype(to)>;
      for (int64_t i = 0; i < c; ++i) to[i] = static_cast<T>((1 - momentum) * to[i] + factor * values[i]);
    };
    if (dtype_of(running) == DType::kFloat64) {
      apply(static_cast<double*>(running.data_ptr()));
    } else {
      STD_TORCH_CHECK(dtype_of(running) == DType::kFloat32, "convext_cpu: running ", name,
                      " must be float32 or float64");
      apply(static_cast<float*>(running.data_ptr()));
    }
  };
  update(running_mean, mean, "mean", momentum);
  update(running_var, var, "var", momentum * unbiased);
}

// What the ops of gates share: y in NHWC, which it is to be without a copy, and the parameters in scratch memory.
struct Gated {
  View yv;
  BatchNormArgs args;
  Channels channels;
  const BatchNorm& kernels;
  int64_t workspace;

  Gated(const Tensor& y, const Channels& given)
      : yv(view_of(y, "y")),
        args(args_of(yv, Layout::kNHWC)),
        channels(given),
        kernels(batch_norm_for(settings().cpu_isa)),
        workspace(kernels.workspace(args)) {
    STD_TORCH_CHECK(yv.is_dense(Layout::kNHWC) && yv.numel() > 0, "convext_cpu: y must be channels-last");
    args.y = yv.data;
  }

  int64_t scratch_bytes() const { return channels.scratch_bytes(args) + Scratch::padded(workspace); }

  const void* vectors(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(
        t.is_cpu() && t.is_contiguous() && dtype_of(t) == compute_dtype(args.dtype) && t.numel() == args.n * args.c,
        "convext_cpu: ", name, " must be (N, C) in the compute dtype");
    return t.const_data_ptr();
  }
};

// Of activation(batch_norm(y)), by image and channel: factor times the sum, or with dout of the product with that.
Tensor bn_act_image_sums(const OptionalTensor& dout, const Tensor& y, const OptionalTensor& mean,
                         const OptionalTensor& var, const OptionalTensor& gamma, const OptionalTensor& beta, double eps,
                         int64_t activation, double factor) {
  Gated call(y, {mean, var, gamma, beta, eps, activation});
  std::optional<Dense> incoming;
  if (dout) incoming.emplace(matching_view(*dout, "dout", call.yv), Layout::kNHWC);
  Tensor sums = empty_matrix(call.args.n, call.args.c, compute_dtype(call.args.dtype));
  const ScratchScope scope(call.scratch_bytes() + (incoming ? incoming->scratch_bytes() : 0));
  const Parallel& parallel = torch_parallel();
  call.channels.load(call.args);
  const void* const d = incoming ? incoming->get(staging_for(settings().cpu_isa), parallel) : nullptr;
  call.kernels.image_sums(parallel, call.args, d, factor, sums.data_ptr(), scratch().take(call.workspace));
  return sums;
}

Tensor bn_act_gated(const Tensor& y, const OptionalTensor& mean, const OptionalTensor& var, const OptionalTensor& gamma,
                    const OptionalTensor& beta, double eps, int64_t activation, const Tensor& gates) {
  Gated call(y, {mean, var, gamma, beta, eps, activation});
  Tensor out = empty_like(call.yv);
  const ScratchScope scope(call.scratch_bytes());
  call.channels.load(call.args);
  call.kernels.gated(torch_parallel(), call.args, call.vectors(gates, "gates"), out.data_ptr(),
                     scratch().take(call.workspace));
  return out;
}

// dout * gates + shifts, and the sums that bn_act_and_sums finds of that.
std::tuple<Tensor, Tensor> bn_act_gated_backward(const Tensor& dout, const Tensor& y, const OptionalTensor& mean,
                                                 const OptionalTensor& var, const OptionalTensor& gamma,
                                                 const OptionalTensor& beta, double eps, int64_t activation,
                                                 const Tensor& gates, const Tensor& shifts) {
  Gated call(y, {mean, var, gamma, beta, eps, activation});
  const Dense incoming(matching_view(dout, "dout", call.yv), Layout::kNHWC);
  Tensor da = empty_like(call.yv), sums = empty_vector(2 * call.args.c, DType::kFloat64);
  const ScratchScope scope(call.scratch_bytes() + incoming.scratch_bytes());
  const Parallel& parallel = torch_parallel();
  call.channels.load(call.args);
  const void* const d = incoming.get(staging_for(settings().cpu_isa), parallel);
  call.kernels.gated_backward(parallel, call.args, d, {call.vectors(gates, "gates"), call.vectors(shifts, "shifts")},
                              da.data_ptr(), static_cast<double*>(sums.data_ptr()), scratch().take(call.workspace));
  return {da, sums};
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
  m.def(
      "update_running(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, float momentum, "
      "float unbiased) -> ()");
  m.def(
      "bn_act_image_sums(Tensor? dout, Tensor y, Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, float eps, "
      "int activation, float factor) -> Tensor");
  m.def(
      "bn_act_gated(Tensor y, Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, float eps, int activation, "
      "Tensor gates) -> Tensor");
  m.def(
      "bn_act_gated_backward(Tensor dout, Tensor y, Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, float eps, "
      "int activation, Tensor gates, Tensor shifts) -> (Tensor da, Tensor sums)");
}

STABLE_TORCH_LIBRARY_IMPL(convext_cpu, CPU, m) {
  m.impl("batch_stats", TORCH_BOX(&convext::batch_stats));
  m.impl("bn_act", TORCH_BOX(&convext::bn_act));
  m.impl("bn_act_backward", TORCH_BOX(&convext::bn_act_backward));
  m.impl("bn_act_and_sums", TORCH_BOX(&convext::bn_act_and_sums));
  m.impl("bn_act_from_sums", TORCH_BOX(&convext::bn_act_from_sums));
  m.impl("update_running", TORCH_BOX(&convext::update_running));
  m.impl("bn_act_image_sums", TORCH_BOX(&convext::bn_act_image_sums));
  m.impl("bn_act_gated", TORCH_BOX(&convext::bn_act_gated));
  m.impl("bn_act_gated_backward", TORCH_BOX(&convext::bn_act_gated_backward));
}
