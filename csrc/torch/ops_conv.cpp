// The torch-facing side of the CPU convolutions: schemas, argument checks, staging, launch. The ops are private to
// convext (namespace convext_cpu); convext/backends/native.py calls them.
//
// A kernel sees dense tensors in its own dtype. What arrives otherwise (NCHW, half precision that it does not read, odd
// strides) is staged through scratch memory on the way in, and so is the result on the way out.
#include "conv_call.h"

namespace convext {
namespace {

// How one activation operand reaches the kernel: as it lies, or through a staged copy in `layout`.
struct Operand {
  View view;
  Layout layout = Layout::kNHWC;  // what the kernel sees
  bool staged = false;
  int64_t bytes = 0;  // of the staged copy
  void* data = nullptr;

  Operand(const View& v, bool takes_nchw, DType compute) : view(v) {
    const bool same_dtype = v.dtype == compute;
    if (same_dtype && v.is_dense(Layout::kNHWC)) {
      data = v.data;
    } else if (same_dtype && takes_nchw && v.is_dense(Layout::kNCHW)) {
      layout = Layout::kNCHW;
      data = v.data;
    } else {
      stage(compute);
    }
  }

  void force_nhwc(DType compute) {
    if (layout == Layout::kNCHW) stage(compute);
  }

 private:
  void stage(DType compute) {
    layout = Layout::kNHWC;
    staged = true;
    bytes = Scratch::padded(view.numel() * dtype_size(compute));
  }
};

void stage_in(Operand& operand, DType compute, const Staging& staging, const Parallel& parallel) {
  if (!operand.staged) return;
  operand.data = scratch().take(operand.bytes);
  staging.to_nhwc(parallel, operand.view.data, operand.view.dtype, operand.view.size, operand.view.stride, operand.data,
                  compute);
}

void stage_out(const Operand& operand, DType compute, const Staging& staging, const Parallel& parallel) {
  if (!operand.staged) return;
  staging.from_nhwc(parallel, operand.data, compute, operand.view.data, operand.view.dtype, operand.view.size,
                    operand.view.stride);
}

// The end of fprop and dgrad: the kernel, from `in` to `out`, by way of the copies that were reserved.
void run(const Variant& variant, const ConvProblem& problem, Operand& in, Operand& out, LaunchArgs& args,
         const Staging& staging) {
  const Parallel& parallel = *args.parallel;
  stage_in(in, problem.dtype, staging, parallel);
  args.a = in.data;
  if (out.staged) out.data = scratch().take(out.bytes);
  args.out = out.data;
  args.workspace = scratch().take(workspace_bytes(variant, problem, parallel));
  launch(variant, problem, args);
  stage_out(out, problem.dtype, staging, parallel);
}

// ---- ops -----------------------------------------------------------------------------------------------------------

Tensor fprop(int64_t variant_index, const Tensor& x, const Tensor& w, int64_t packed, int64_t version,
             const OptionalTensor& bias, const OptionalTensor& mean, const OptionalTensor& var,
             const OptionalTensor& gamma, const OptionalTensor& beta, const OptionalTensor& residual,
             std::vector<int64_t> geom, double eps, int64_t activation, bool channels_last) {
  const View xv = view_of(x, "x"), wv = view_of(w, "w");
  STD_TORCH_CHECK(xv.dtype == wv.dtype || (wv.dtype == DType::kFloat32 && dtype_size(xv.dtype) == 2),
                  "convext_cpu: x and w must have one dtype, or w be float32 and x in half precision");
  const Geom g = geom_of(geom);
  ConvProblem problem =
      make_problem(xv.size[0], xv.size[1], xv.size[2], xv.size[3], wv.size[0], wv.size[2], wv.size[3], g, xv.dtype);
  STD_TORCH_CHECK(wv.size[1] == problem.c_per_group(), "convext_cpu: w holds ", wv.size[1],
                  " input channels a group, x ", problem.c_per_group());
  const Variant& variant = checked_variant(variant_index, Pass::kFprop, problem);
  const DType compute = problem.dtype;
  Tensor y = empty_activation(problem.n, problem.k, problem.p(), problem.q(), xv.dtype, channels_last);
  if (problem.y_size() == 0) return y;

  const Staging& staging = staging_for(settings().cpu_isa);
  const Parallel& parallel = torch_parallel();
  Operand in(xv, variant.takes_nchw_x(), compute), out(view_of(y, "y"), variant.takes_nchw_y(), compute);
  std::optional<Operand> addend;
  if (residual) {
    addend.emplace(view_of(*residual, "residual"), variant.takes_nchw_y(), compute);
    for (int i = 0; i < 4; ++i) {
      STD_TORCH_CHECK(addend->view.size[i] == out.view.size[i], "convext_cpu: residual must have the output's shape");
    }
    if (addend->staged || addend->layout != out.layout) {  // the kernel reads it where it writes y: in one layout
      addend->force_nhwc(compute);
      out.force_nhwc(compute);
    }
  }
  problem.x_layout = in.layout;
  problem.y_layout = out.layout;
  const std::shared_ptr<PackedWeight> kept = packed_weight(packed);
  const Weights weights{variant, problem, wv, kept.get(), version};
  PackedWeight::Lease lease;
  const BatchNormTensors<OptionalTensor> norm{bias, mean, var, gamma, beta, eps};
  const ScratchScope scope(in.bytes + out.bytes + (addend ? addend->bytes : 0) + weights.scratch_bytes() +
                           norm.scratch_bytes(problem.k, problem.accumulate_dtype()) +
                           workspace_bytes(variant, problem, parallel));
  LaunchArgs args{};
  args.parallel = &parallel;
  args.epilogue.activation = static_cast<Activation>(activation);
  if (compute == DType::kFloat64) {
    norm.fold<double>(problem.k, args.epilogue);
  } else {
    norm.fold<float>(problem.k, args.epilogue);
  }
  args.b = weights.get(staging, parallel, lease);
  args.weights = weights.source();
  if (addend) {
    stage_in(*addend, compute, staging, parallel);
    args.epilogue.residual = addend->data;
  }
  run(variant, problem, in, out, args, staging);
  return y;
}

Tensor dgrad(int64_t variant_index, const Tensor& dy, const Tensor& w, int64_t packed, int64_t version, int64_t height,
             int64_t width, std::vector<int64_t> geom, bool channels_last) {
  const View dyv = view_of(dy, "dy"), wv = view_of(w, "w");
  STD_TORCH_CHECK(dyv.dtype == wv.dtype, "convext_cpu: dy and w must have one dtype");
  const Geom g = geom_of(geom);
  ConvProblem problem =
      make_problem(dyv.size[0], wv.size[1] * g.groups, height, width, wv.size[0], wv.size[2], wv.size[3], g, dyv.dtype);
  STD_TORCH_CHECK(dyv.size[1] == problem.k && dyv.size[2] == problem.p() && dyv.size[3] == problem.q(),
                  "convext_cpu: dy must be (", problem.n, ", ", problem.k, ", ", problem.p(), ", ", problem.q(), ")");
  const Variant& variant = checked_variant(variant_index, Pass::kDgrad, problem);
  const DType compute = problem.dtype;
  Tensor dx = empty_activation(problem.n, problem.c, problem.h, problem.w, dyv.dtype, channels_last);
  if (problem.x_size() == 0) return dx;
  if (problem.y_size() == 0) return torch::stable::zero_(dx);

  const Staging& staging = staging_for(settings().cpu_isa);
  const Parallel& parallel = torch_parallel();
  Operand in(dyv, variant.takes_nchw_y(), compute), out(view_of(dx, "dx"), variant.takes_nchw_x(), compute);
  problem.y_layout = in.layout;
  problem.x_layout = out.layout;
  const std::shared_ptr<PackedWeight> kept = packed_weight(packed);
  const Weights weights{variant, problem, wv, kept.get(), version};
  PackedWeight::Lease lease;
  const ScratchScope scope(in.bytes + out.bytes + weights.scratch_bytes() +
                           workspace_bytes(variant, problem, parallel));
  LaunchArgs args{};
  args.parallel = &parallel;
  args.b = weights.get(staging, parallel, lease);
  args.weights = weights.source();
  run(variant, problem, in, out, args, staging);
  return dx;
}

Tensor wgrad(int64_t variant_index, const Tensor& dy, const Tensor& x, int64_t r, int64_t s, std::vector<int64_t> geom,
             bool channels_last) {
  const View dyv = view_of(dy, "dy"), xv = view_of(x, "x");
  STD_TORCH_CHECK(dyv.dtype == xv.dtype, "convext_cpu: dy and x must have one dtype");
  const Geom g = geom_of(geom);
  ConvProblem problem = make_problem(xv.size[0], xv.size[1], xv.size[2], xv.size[3], dyv.size[1], r, s, g, xv.dtype);
  STD_TORCH_CHECK(dyv.size[0] == problem.n && dyv.size[2] == problem.p() && dyv.size[3] == problem.q(),
                  "convext_cpu: dy must be (", problem.n, ", ", problem.k, ", ", problem.p(), ", ", problem.q(), ")");
  const Variant& variant = checked_variant(variant_index, Pass::kWgrad, problem);
  const DType compute = problem.dtype;
  Tensor dw = empty_activation(problem.k, problem.c_per_group(), r, s, xv.dtype, channels_last);
  if (problem.w_size() == 0) return dw;
  if (problem.y_size() == 0 || problem.x_size() == 0) return torch::stable::zero_(dw);

  const Staging& staging = staging_for(settings().cpu_isa);
  const Parallel& parallel = torch_parallel();
  Operand a(dyv, variant.takes_nchw_y(), compute), b(xv, variant.takes_nchw_x(), compute);
  problem.y_layout = a.layout;
  problem.x_layout = b.layout;
  const View out = view_of(dw, "dw");
  const bool direct = out.dtype == compute && out.is_dense(Layout::kNCHW);  // as kernels write it
  const int64_t out_bytes = direct ? 0 : Scratch::padded(out.numel() * dtype_size(compute));
  const ScratchScope scope(a.bytes + b.bytes + out_bytes + workspace_bytes(variant, problem, parallel));
  stage_in(a, compute, staging, parallel);
  stage_in(b, compute, staging, parallel);
  LaunchArgs args{};
  args.parallel = &parallel;
  args.a = a.data;
  args.b = b.data;
  args.out = direct ? out.data : scratch().take(out_bytes);
  args.workspace = scratch().take(workspace_bytes(variant, problem, parallel));
  launch(variant, problem, args);
  if (!direct) staging.weight_from_dense(parallel, args.out, compute, out.data, out.dtype, out.size, out.stride);
  return dw;
}

// x in the order NCHW. torch's own copy from channels-last reads as many cache lines as there are channels at a time.
Tensor to_nchw(const Tensor& x) {
  const View from = view_of(x, "x");
  Tensor y = empty_activation(from.size[0], from.size[1], from.size[2], from.size[3], from.dtype, false);
  const View to = view_of(y, "y");
  staging_for(settings().cpu_isa)
      .copy(torch_parallel(), from.data, from.dtype, from.stride, to.data, to.dtype, to.stride, to.size);
  return y;
}

}  // namespace
}  // namespace convext

// geom is stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups. `packed` is the number of the PackedWeight that
// keeps the weight's packings, or 0; `version` the weight's version counter: see packed_weight.h.
STABLE_TORCH_LIBRARY(convext_cpu, m) {
  m.def(
      "fprop(int variant, Tensor x, Tensor w, int packed, int version, Tensor? bias, Tensor? mean, Tensor? var, "
      "Tensor? gamma, Tensor? beta, Tensor? residual, int[] geom, float eps, int activation, bool channels_last) "
      "-> Tensor");
  m.def(
      "dgrad(int variant, Tensor dy, Tensor w, int packed, int version, int height, int width, int[] geom, "
      "bool channels_last) -> Tensor");
  m.def("wgrad(int variant, Tensor dy, Tensor x, int r, int s, int[] geom, bool channels_last) -> Tensor");
  m.def("to_nchw(Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(convext_cpu, CPU, m) {
  m.impl("fprop", TORCH_BOX(&convext::fprop));
  m.impl("dgrad", TORCH_BOX(&convext::dgrad));
  m.impl("wgrad", TORCH_BOX(&convext::wgrad));
  m.impl("to_nchw", TORCH_BOX(&convext::to_nchw));
}
