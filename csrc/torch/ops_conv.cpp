// The torch-facing side of the CPU convolutions: schemas, argument checks, staging, launch. The ops are private to
// convext (namespace convext_cpu); convext/backends/native.py calls them.
//
// A kernel sees dense tensors in its own dtype. What arrives otherwise (NCHW, half precision that it does not read, odd
// strides) is staged through scratch memory on the way in, and so is the result on the way out.
#include <array>
#include <exception>
#include <string>

#include "conv_call.h"
#include "cpu/runtime/direct.h"

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

// What follows the sums of fprop or dgrad.
struct Tail {
  BatchNormTensors<OptionalTensor> norm;
  const OptionalTensor& residual;
  int64_t activation;
};

// fprop and dgrad: `to`, of the problem's extents, from `from` and the weights.
void convolve(const Variant& variant, const ConvProblem& whole, const View& from, const View& wv, int64_t packed,
              int64_t version, const Tail& tail, const View& to) {
  const auto [flat, nhwc_only] = flattened(whole);
  ConvProblem problem = flat;
  const bool dgrad = variant.pass == Pass::kDgrad;
  const DType compute = problem.dtype;
  const Staging& staging = staging_for(settings().cpu_isa);
  const Parallel& parallel = torch_parallel();
  const bool nchw_x = variant.takes_nchw_x() && !nhwc_only, nchw_y = variant.takes_nchw_y() && !nhwc_only;
  const bool nchw_out = dgrad ? nchw_x : nchw_y;
  Operand in(from, dgrad ? nchw_y : nchw_x, compute), out(to, nchw_out, compute);
  std::optional<Operand> addend;
  if (tail.residual) {
    addend.emplace(view_of_any(*tail.residual, "residual"), nchw_out, compute);
    for (int i = 0; i < 4; ++i) {
      STD_TORCH_CHECK(addend->view.size[i] == out.view.size[i], "convext_cpu: residual must have the output's shape");
    }
    if (addend->staged || addend->layout != out.layout) {  // the kernel reads it where it writes: in one layout
      addend->force_nhwc(compute);
      out.force_nhwc(compute);
    }
  }
  (dgrad ? problem.y_layout : problem.x_layout) = in.layout;
  (dgrad ? problem.x_layout : problem.y_layout) = out.layout;
  const int64_t channels = dgrad ? problem.c : problem.k;
  const std::shared_ptr<PackedWeight> kept = packed_weight(packed);
  const Weights weights{variant, problem, wv, kept.get(), version};
  PackedWeight::Lease lease;
  const ScratchScope scope(in.bytes + out.bytes + (addend ? addend->bytes : 0) + weights.scratch_bytes() +
                           tail.norm.scratch_bytes(channels, problem.accumulate_dtype()) +
                           workspace_bytes(variant, problem, parallel));
  LaunchArgs args{};
  args.parallel = &parallel;
  args.epilogue.activation = static_cast<Activation>(tail.activation);
  if (compute == DType::kFloat64) {
    tail.norm.fold<double>(channels, args.epilogue);
  } else {
    tail.norm.fold<float>(channels, args.epilogue);
  }
  args.b = weights.get(staging, parallel, lease);
  args.weights = weights.source();
  if (addend) {
    stage_in(*addend, compute, staging, parallel);
    args.epilogue.residual = addend->data;
  }
  stage_in(in, compute, staging, parallel);
  args.a = in.data;
  if (out.staged) out.data = scratch().take(out.bytes);
  args.out = out.data;
  args.workspace = scratch().take(workspace_bytes(variant, problem, parallel));
  launch(variant, problem, args);
  stage_out(out, compute, staging, parallel);
}

// Memory for a volume of 5 dimensions, or for an image of 4.
Tensor empty_of(int64_t dims, int64_t n, int64_t c, int64_t d, int64_t h, int64_t w, DType dtype, bool channels_last) {
  return dims == 5 ? empty_volume(n, c, d, h, w, dtype, channels_last)
                   : empty_activation(n, c, h, w, dtype, channels_last);
}

// {D or T, or 1 of an image; H or R; W or S}.
std::array<int64_t, 3> extents_of(const std::vector<int64_t>& sizes, const char* name) {
  STD_TORCH_CHECK(sizes.size() == 2 || sizes.size() == 3, "convext_cpu: ", name, " must be 2 or 3 numbers, got ",
                  sizes.size());
  return {sizes.size() == 3 ? sizes[0] : 1, sizes[sizes.size() - 2], sizes.back()};
}

void check_dy(const View& dy, const ConvProblem& p) {
  STD_TORCH_CHECK(
      dy.size[0] == p.n && dy.size[1] == p.k && dy.planes == p.z() && dy.rows() == p.p() && dy.size[3] == p.q(),
      "convext_cpu: dy must be (", p.n, ", ", p.k, ", ", p.z(), ", ", p.p(), ", ", p.q(), ")");
}

// ---- of views --------------------------------------------------------------------------------------------------------

// y, of `dims` dimensions.
Tensor fprop_of(int64_t variant_index, int64_t dims, const View& xv, const View& wv, int64_t packed, int64_t version,
                const Tail& tail, const Geom& g, bool channels_last) {
  STD_TORCH_CHECK(xv.dtype == wv.dtype || (wv.dtype == DType::kFloat32 && dtype_size(xv.dtype) == 2),
                  "convext_cpu: x and w must have one dtype, or w be float32 and x in half precision");
  ConvProblem problem = make_problem(xv.size[0], xv.size[1], xv.rows(), xv.size[3], wv.size[0], wv.rows(), wv.size[3],
                                     g, xv.dtype, xv.planes, wv.planes);
  STD_TORCH_CHECK(wv.size[1] == problem.c_per_group(), "convext_cpu: w holds ", wv.size[1],
                  " input channels a group, x ", problem.c_per_group());
  const Variant& variant = checked_variant(variant_index, Pass::kFprop, problem);
  Tensor y = empty_of(dims, problem.n, problem.k, problem.z(), problem.p(), problem.q(), xv.dtype, channels_last);
  if (problem.y_size() == 0) return y;
  convolve(variant, problem, xv, wv, packed, version, tail, view_of_any(y, "y"));
  return y;
}

// dx, with what follows its sums. `input_size`: D, H, W.
Tensor dgrad_of(int64_t variant_index, int64_t dims, const View& dyv, const View& wv, int64_t packed, int64_t version,
                const Tail& tail, const std::array<int64_t, 3>& input_size, const Geom& g, bool channels_last) {
  STD_TORCH_CHECK(dyv.dtype == wv.dtype, "convext_cpu: dy and w must have one dtype");
  const auto [depth, height, width] = input_size;
  ConvProblem problem = make_problem(dyv.size[0], wv.size[1] * g.groups, height, width, wv.size[0], wv.rows(),
                                     wv.size[3], g, dyv.dtype, depth, wv.planes);
  check_dy(dyv, problem);
  const Variant& variant = checked_variant(variant_index, Pass::kDgrad, problem);
  Tensor dx = empty_of(dims, problem.n, problem.c, depth, height, width, dyv.dtype, channels_last);
  if (problem.x_size() == 0) return dx;
  STD_TORCH_CHECK(problem.y_size() > 0, "convext_cpu: dy must not be empty");
  convolve(variant, problem, dyv, wv, packed, version, tail, view_of_any(dx, "dx"));
  return dx;
}

// dw. `kernel_size`: T, R, S.
Tensor wgrad_of(int64_t variant_index, int64_t dims, const View& dyv, const View& xv,
                const std::array<int64_t, 3>& kernel_size, const Geom& g, bool channels_last) {
  STD_TORCH_CHECK(dyv.dtype == xv.dtype, "convext_cpu: dy and x must have one dtype");
  const auto [t, r, s] = kernel_size;
  ConvProblem problem =
      make_problem(xv.size[0], xv.size[1], xv.rows(), xv.size[3], dyv.size[1], r, s, g, xv.dtype, xv.planes, t);
  check_dy(dyv, problem);
  const Variant& variant = checked_variant(variant_index, Pass::kWgrad, problem);
  const DType compute = problem.dtype;
  Tensor dw = empty_of(dims, problem.k, problem.c_per_group(), t, r, s, xv.dtype, channels_last);
  if (problem.w_size() == 0) return dw;
  if (problem.y_size() == 0 || problem.x_size() == 0) return torch::stable::zero_(dw);

  const auto [flat, nhwc_only] = flattened(problem);
  problem = flat;
  const Staging& staging = staging_for(settings().cpu_isa);
  const Parallel& parallel = torch_parallel();
  Operand a(dyv, variant.takes_nchw_y() && !nhwc_only, compute), b(xv, variant.takes_nchw_x() && !nhwc_only, compute);
  problem.y_layout = a.layout;
  problem.x_layout = b.layout;
  const View out = view_of_any(dw, "dw");
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

// ---- ops -----------------------------------------------------------------------------------------------------------

Tensor fprop(int64_t variant_index, const Tensor& x, const Tensor& w, int64_t packed, int64_t version,
             const OptionalTensor& bias, const OptionalTensor& mean, const OptionalTensor& var,
             const OptionalTensor& gamma, const OptionalTensor& beta, const OptionalTensor& residual,
             std::vector<int64_t> geom, double eps, int64_t activation, bool channels_last) {
  return fprop_of(variant_index, x.dim(), view_of_any(x, "x"), view_of_any(w, "w"), packed, version,
                  {{bias, mean, var, gamma, beta, eps}, residual, activation}, geom_of(geom), channels_last);
}

Tensor dgrad(int64_t variant_index, const Tensor& dy, const Tensor& w, int64_t packed, int64_t version,
             std::vector<int64_t> input_size, std::vector<int64_t> geom, bool channels_last) {
  const OptionalTensor none;
  return dgrad_of(variant_index, dy.dim(), view_of_any(dy, "dy"), view_of_any(w, "w"), packed, version,
                  {{none, none, none, none, none, 0.0}, none, 0}, extents_of(input_size, "input_size"), geom_of(geom),
                  channels_last);
}

// dgrad(x, w) + bias, of C channels.
Tensor conv_transpose(int64_t variant_index, const Tensor& x, const Tensor& w, int64_t packed, int64_t version,
                      const OptionalTensor& bias, std::vector<int64_t> size, std::vector<int64_t> geom,
                      bool channels_last) {
  const OptionalTensor none;
  return dgrad_of(variant_index, x.dim(), view_of_any(x, "x"), view_of_any(w, "w"), packed, version,
                  {{bias, none, none, none, none, 0.0}, none, 0}, extents_of(size, "input_size"), geom_of(geom),
                  channels_last);
}

Tensor wgrad(int64_t variant_index, const Tensor& dy, const Tensor& x, std::vector<int64_t> kernel_size,
             std::vector<int64_t> geom, bool channels_last) {
  return wgrad_of(variant_index, x.dim(), view_of_any(dy, "dy"), view_of_any(x, "x"),
                  extents_of(kernel_size, "kernel_size"), geom_of(geom), channels_last);
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

// ---- the same for convext/_call ------------------------------------------------------------------------------------

constexpr int64_t kImage = 4;  // dimensions

// A reference of our own to the tensor of somebody else's handle.
Tensor borrowed(void* handle) {
  AtenTensorHandle own;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(static_cast<AtenTensorHandle>(handle), &own));
  return Tensor(own);
}

// What `compute` returns, as a handle of the caller's own; or the words of what it throws.
template <class F>
const char* directly(void** result, F&& compute) {
  static thread_local std::string wrong;
  try {
    const Tensor computed = compute();
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(computed.get(), &handle));
    *result = handle;
    return nullptr;
  } catch (const std::exception& error) {
    wrong = error.what();
    return wrong.c_str();
  }
}

const char* direct_fprop(int64_t variant, const View& x, const View& w, int64_t packed, int64_t version, void* bias,
                         const Geom& geom, bool channels_last, void** result) {
  return directly(result, [&] {
    const OptionalTensor none, shift = bias != nullptr ? OptionalTensor(borrowed(bias)) : none;
    return fprop_of(variant, kImage, x, w, packed, version, {{shift, none, none, none, none, 0.0}, none, 0}, geom,
                    channels_last);
  });
}

const char* direct_dgrad(int64_t variant, const View& dy, const View& w, int64_t packed, int64_t version,
                         int64_t height, int64_t width, const Geom& geom, bool channels_last, void** result) {
  return directly(result, [&] {
    const OptionalTensor none;
    return dgrad_of(variant, kImage, dy, w, packed, version, {{none, none, none, none, none, 0.0}, none, 0},
                    {1, height, width}, geom, channels_last);
  });
}

const char* direct_wgrad(int64_t variant, const View& dy, const View& x, int64_t r, int64_t s, const Geom& geom,
                         bool channels_last, void** result) {
  return directly(result, [&] { return wgrad_of(variant, kImage, dy, x, {1, r, s}, geom, channels_last); });
}

}  // namespace

const DirectCalls& direct_calls() {
  static const DirectCalls calls{&direct_fprop, &direct_dgrad, &direct_wgrad};
  return calls;
}

}  // namespace convext

// geom is stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups, and of volumes stride_d, pad_d, dil_d behind them.
// `packed` is the number of the PackedWeight that keeps the weight's packings, or 0; `version` the weight's version
// counter: see packed_weight.h.
STABLE_TORCH_LIBRARY(convext_cpu, m) {
  m.def(
      "fprop(int variant, Tensor x, Tensor w, int packed, int version, Tensor? bias, Tensor? mean, Tensor? var, "
      "Tensor? gamma, Tensor? beta, Tensor? residual, int[] geom, float eps, int activation, bool channels_last) "
      "-> Tensor");
  m.def(
      "dgrad(int variant, Tensor dy, Tensor w, int packed, int version, int[] input_size, int[] geom, "
      "bool channels_last) -> Tensor");
  m.def(
      "conv_transpose(int variant, Tensor x, Tensor w, int packed, int version, Tensor? bias, int[] size, int[] geom, "
      "bool channels_last) -> Tensor");
  m.def("wgrad(int variant, Tensor dy, Tensor x, int[] kernel_size, int[] geom, bool channels_last) -> Tensor");
  m.def("to_nchw(Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(convext_cpu, CPU, m) {
  m.impl("fprop", TORCH_BOX(&convext::fprop));
  m.impl("dgrad", TORCH_BOX(&convext::dgrad));
  m.impl("conv_transpose", TORCH_BOX(&convext::conv_transpose));
  m.impl("wgrad", TORCH_BOX(&convext::wgrad));
  m.impl("to_nchw", TORCH_BOX(&convext::to_nchw));
}
