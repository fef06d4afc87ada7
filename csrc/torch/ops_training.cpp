// The torch-facing side of cpu/runtime/training.h: a convolution with the batch norms before and behind it.
#include <tuple>

#include "batch_norm_call.h"
#include "conv_call.h"
#include "cpu/runtime/training.h"

namespace convext {
namespace {

// A batch norm and its activation over y, as operands.
struct Normed {
  View yv;
  Dense dense;
  BatchNormArgs args;
  Channels channels;

  Normed(const Tensor& y, const char* name, const Channels& given)
      : yv(view_of(y, name)), dense(yv, Layout::kNHWC), args(args_of(yv, Layout::kNHWC)), channels(given) {}

  int64_t scratch_bytes() const { return dense.scratch_bytes() + channels.scratch_bytes(args); }

  void load(const Staging& staging, const Parallel& parallel) {
    channels.load(args);
    args.y = dense.get(staging, parallel);
  }
};

// The convolution's problem, all in NHWC and in the tensors' own dtype, which its kernels read.
ConvProblem problem_of(const View& x, const View& w, const Geom& geom) {
  STD_TORCH_CHECK(x.dtype == w.dtype && dtype_size(x.dtype) >= 4,
                  "convext_cpu: x and w must both be float32 or float64");
  ConvProblem problem =
      make_problem(x.size[0], x.size[1], x.size[2], x.size[3], w.size[0], w.size[2], w.size[3], geom, x.dtype);
  STD_TORCH_CHECK(w.size[1] == problem.c_per_group(), "convext_cpu: w holds ", w.size[1], " input channels a group, x ",
                  problem.c_per_group());
  STD_TORCH_CHECK(problem.x_size() > 0 && problem.y_size() > 0, "convext_cpu: x and y must not be empty");
  return problem;
}

const Variant& variant_of_own_dtype(int64_t index, Pass pass, const ConvProblem& problem) {
  ConvProblem read = problem;
  const Variant& variant = checked_variant(index, pass, read);
  STD_TORCH_CHECK(read.dtype == problem.dtype, "convext_cpu: ", variant.name, " reads another dtype");
  return variant;
}

void check(const char* failure) { STD_TORCH_CHECK(failure == nullptr, "convext_cpu: a kernel failed: ", failure); }

// y, channels-last, mean and variance. With in_mean x is the y of the layer before, of whose batch norm and activation
// the convolution is.
std::tuple<Tensor, Tensor, Tensor> fprop_batch_stats(int64_t variant_index, const Tensor& x,
                                                     const OptionalTensor& in_mean, const OptionalTensor& in_var,
                                                     const OptionalTensor& in_gamma, const OptionalTensor& in_beta,
                                                     double in_eps, int64_t in_activation, const Tensor& w,
                                                     int64_t packed, int64_t version, const OptionalTensor& bias,
                                                     std::vector<int64_t> geom) {
  const View wv = view_of(w, "w");
  ConvProblem problem = problem_of(view_of(x, "x"), wv, geom_of(geom));
  const Variant& variant = variant_of_own_dtype(variant_index, Pass::kFprop, problem);
  Normed input(x, "x", {in_mean, in_var, in_gamma, in_beta, in_eps, in_activation});
  const bool as_it_lies = !in_mean && variant.takes_nchw_x() && input.yv.is_dense(Layout::kNCHW) && input.dense.staged;
  if (as_it_lies) input.dense.staged = false, problem.x_layout = Layout::kNCHW;
  Tensor y = empty_activation(problem.n, problem.k, problem.p(), problem.q(), problem.dtype, true);
  Tensor mean = empty_vector(problem.k, DType::kFloat64), var = empty_vector(problem.k, problem.dtype);
  const OptionalTensor none;
  const BatchNormTensors<OptionalTensor> shift{bias, none, none, none, none, 0.0};

  FpropStats call{};
  call.variant = &variant;
  call.problem = problem;
  call.input = in_mean ? &input.args : nullptr;
  call.output = args_of(view_of(y, "y"), Layout::kNHWC);
  call.output.y = y.data_ptr();
  call.mean = static_cast<double*>(mean.data_ptr());
  call.var = var.data_ptr();
  const std::shared_ptr<PackedWeight> kept = packed_weight(packed);
  const Weights weights{variant, problem, wv, kept.get(), version};
  const BatchNorm& kernels = batch_norm_for(settings().cpu_isa);
  const Staging& staging = staging_for(settings().cpu_isa);
  const Parallel& parallel = torch_parallel();
  const int64_t workspace = fprop_stats_workspace(call, kernels, parallel.threads);
  const ScratchScope scope(input.scratch_bytes() + weights.scratch_bytes() +
                           shift.scratch_bytes(problem.k, problem.dtype) + Scratch::padded(workspace));
  if (problem.dtype == DType::kFloat64) {
    shift.fold<double>(problem.k, call.args.epilogue);
  } else {
    shift.fold<float>(problem.k, call.args.epilogue);
  }
  PackedWeight::Lease lease;
  call.args.b = weights.get(staging, parallel, lease);
  call.args.weights = weights.source();
  call.args.out = y.data_ptr();
  input.load(staging, parallel);
  call.args.a = input.args.y;
  check(fprop_stats(call, kernels, scratch().take(workspace), parallel));
  return {y, mean, var};
}

// dx, channels-last, dw, dgamma, dbeta and the sums of the layer before, of size 0 unless they are wanted. `sums`: of
// bn_act_and_sums over dout. x as in fprop_batch_stats.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bn_conv_backward(
    int64_t dgrad_index, int64_t wgrad_index, const Tensor& dout, const Tensor& y, const Tensor& mean,
    const Tensor& var, const OptionalTensor& gamma, const OptionalTensor& beta, double eps, int64_t activation,
    const OptionalTensor& sums, const Tensor& x, const OptionalTensor& in_mean, const OptionalTensor& in_var,
    const OptionalTensor& in_gamma, const OptionalTensor& in_beta, double in_eps, int64_t in_activation,
    bool wants_sums, const Tensor& w, int64_t packed, int64_t version, std::vector<int64_t> geom,
    bool dw_channels_last) {
  const View wv = view_of(w, "w");
  const ConvProblem problem = problem_of(view_of(x, "x"), wv, geom_of(geom));
  const OptionalTensor given_mean(mean), given_var(var);
  Normed output(y, "y", {given_mean, given_var, gamma, beta, eps, activation});
  Normed input(x, "x", {in_mean, in_var, in_gamma, in_beta, in_eps, in_activation});
  const Dense incoming(matching_view(dout, "dout", output.yv), Layout::kNHWC);
  const int64_t y_shape[4] = {problem.n, problem.k, problem.p(), problem.q()};
  for (int i = 0; i < 4; ++i) STD_TORCH_CHECK(output.yv.size[i] == y_shape[i], "convext_cpu: y must be x * w");
  STD_TORCH_CHECK(!sums || sums->numel() == 2 * problem.k, "convext_cpu: sums must be what bn_act_and_sums returned");
  wants_sums = wants_sums && in_mean;

  const DType dtype = problem.dtype;
  Tensor dx = empty_activation(problem.n, problem.c, problem.h, problem.w, dtype, true);
  Tensor dw = empty_activation(problem.k, problem.c_per_group(), problem.r, problem.s, dtype, dw_channels_last);
  Tensor dgamma = empty_vector(problem.k, dtype), dbeta = empty_vector(problem.k, dtype);
  Tensor in_sums = empty_vector(wants_sums ? 2 * problem.c : 0, DType::kFloat64);
  const View dwv = view_of(dw, "dw");
  const bool direct = dwv.is_dense(Layout::kNCHW);  // as kernels write it
  const int64_t dw_bytes = direct ? 0 : Scratch::padded(dwv.numel() * dtype_size(dtype));

  BatchNormConvGradients call{};
  call.dgrad = &variant_of_own_dtype(dgrad_index, Pass::kDgrad, problem);
  call.wgrad = &variant_of_own_dtype(wgrad_index, Pass::kWgrad, problem);
  call.problem = problem;
  call.output = output.args;
  call.sums = sums ? static_cast<const double*>(sums->const_data_ptr()) : nullptr;
  call.dgamma = dgamma.data_ptr();
  call.dbeta = dbeta.data_ptr();
  call.input = in_mean ? &input.args : nullptr;
  call.input_sums = wants_sums ? static_cast<double*>(in_sums.data_ptr()) : nullptr;
  call.dx = dx.data_ptr();
  const std::shared_ptr<PackedWeight> kept = packed_weight(packed);
  const Weights weights{*call.dgrad, problem, wv, kept.get(), version};
  const BatchNorm& kernels = batch_norm_for(settings().cpu_isa);
  const WgradSum& sum = wgrad_sum_for(settings().cpu_isa);
  const Staging& staging = staging_for(settings().cpu_isa);
  const Parallel& parallel = torch_parallel();
  const int64_t workspace = batch_norm_conv_gradients_workspace(call, kernels, sum, parallel.threads);
  const ScratchScope scope(output.scratch_bytes() + input.scratch_bytes() + incoming.scratch_bytes() +
                           weights.scratch_bytes() + dw_bytes + Scratch::padded(workspace));
  PackedWeight::Lease lease;
  call.weights = weights.get(staging, parallel, lease);
  call.source = weights.source();
  output.load(staging, parallel);
  input.load(staging, parallel);
  call.output = output.args;
  call.dout = incoming.get(staging, parallel);
  call.x = input.args.y;
  call.dw = direct ? dw.data_ptr() : scratch().take(dw_bytes);
  check(batch_norm_conv_gradients(call, kernels, sum, scratch().take(workspace), parallel));
  if (!direct) staging.weight_from_dense(parallel, call.dw, dtype, dwv.data, dtype, dwv.size, dwv.stride);
  return {dx, dw, dgamma, dbeta, in_sums};
}

}  // namespace
}  // namespace convext

STABLE_TORCH_LIBRARY_FRAGMENT(convext_cpu, m) {
  m.def(
      "fprop_batch_stats(int variant, Tensor x, Tensor? in_mean, Tensor? in_var, Tensor? in_gamma, Tensor? in_beta, "
      "float in_eps, int in_activation, Tensor w, int packed, int version, Tensor? bias, int[] geom) "
      "-> (Tensor y, Tensor mean, Tensor var)");
  m.def(
      "bn_conv_backward(int dgrad, int wgrad, Tensor dout, Tensor y, Tensor mean, Tensor var, Tensor? gamma, "
      "Tensor? beta, float eps, int activation, Tensor? sums, Tensor x, Tensor? in_mean, Tensor? in_var, "
      "Tensor? in_gamma, Tensor? in_beta, float in_eps, int in_activation, bool wants_sums, Tensor w, int packed, "
      "int version, int[] geom, bool dw_channels_last) "
      "-> (Tensor dx, Tensor dw, Tensor dgamma, Tensor dbeta, Tensor in_sums)");
}

STABLE_TORCH_LIBRARY_IMPL(convext_cpu, CPU, m) {
  m.impl("fprop_batch_stats", TORCH_BOX(&convext::fprop_batch_stats));
  m.impl("bn_conv_backward", TORCH_BOX(&convext::bn_conv_backward));
}
