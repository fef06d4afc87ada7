// The torch-facing side of the CPU convolutions: schemas, argument checks, staging, launch. The ops are private to
// convext (namespace convext_cpu); convext/backends/native.py calls them.
//
// A kernel sees dense tensors in the dtype it computes in. What arrives otherwise (NCHW, half precision, odd strides)
// is staged through scratch memory on the way in, and so is the result on the way out.
#include <cmath>
#include <optional>
#include <vector>

#include "cpu/staging.h"
#include "packed_weight.h"
#include "select.h"
#include "torch_glue.h"

namespace convext {
namespace {

// ---- one call --------------------------------------------------------------------------------------------------------

struct Geom {
  int32_t stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups;
};

Geom geom_of(const std::vector<int64_t>& values) {
  STD_TORCH_CHECK(values.size() == 7, "convext_cpu: geom must be 7 numbers, got ", values.size());
  for (int64_t value : values) {
    STD_TORCH_CHECK(value >= 0 && value <= INT32_MAX, "convext_cpu: geom holds ", value, ", outside 32 bits");
  }
  auto at = [&](int i) { return static_cast<int32_t>(values[i]); };
  return {at(0), at(1), at(2), at(3), at(4), at(5), at(6)};
}

ConvProblem make_problem(int64_t n, int64_t c, int64_t h, int64_t w, int64_t k, int64_t r, int64_t s, const Geom& g,
                         DType dtype) {
  for (int64_t extent : {n, c, h, w, k, r, s}) {
    STD_TORCH_CHECK(extent <= INT32_MAX, "convext_cpu: an extent of ", extent, " exceeds 32 bits");
  }
  STD_TORCH_CHECK(g.groups > 0 && c % g.groups == 0 && k % g.groups == 0, "convext_cpu: ", c, " input and ", k,
                  " output channels do not divide into ", g.groups, " groups");
  STD_TORCH_CHECK(g.stride_h > 0 && g.stride_w > 0 && g.dil_h > 0 && g.dil_w > 0 && r > 0 && s > 0,
                  "convext_cpu: stride, dilation and filter extents must be positive");
  ConvProblem problem{};
  problem.n = n, problem.c = c, problem.h = h, problem.w = w;
  problem.k = k, problem.r = r, problem.s = s;
  problem.stride_h = g.stride_h, problem.stride_w = g.stride_w;
  problem.pad_h = g.pad_h, problem.pad_w = g.pad_w;
  problem.dil_h = g.dil_h, problem.dil_w = g.dil_w;
  problem.groups = g.groups;
  problem.dtype = compute_dtype(dtype);
  problem.x_layout = problem.y_layout = Layout::kNHWC;
  STD_TORCH_CHECK(problem.p() >= 0 && problem.q() >= 0, "convext_cpu: the filter does not fit into the padded input");
  return problem;
}

const Variant& checked_variant(int64_t index, Pass pass, const ConvProblem& problem) {
  const auto& all = variants();
  STD_TORCH_CHECK(index >= 0 && index < static_cast<int64_t>(all.size()), "convext_cpu: there is no variant ", index);
  const Variant& variant = *all[index];
  const char* why = reject(variant, Device::kCPU, pass, problem);
  STD_TORCH_CHECK(why == nullptr, "convext_cpu: ", variant.name, " rejects the problem: ", why);
  return variant;
}

// How one activation operand reaches the kernel: as it lies, or through a staged copy in `layout`.
struct Operand {
  View view;
  Layout layout = Layout::kNHWC;  // what the kernel sees
  bool staged = false;
  int64_t bytes = 0;  // of the staged copy
  void* data = nullptr;

  Operand(const View& v, const Variant& variant, DType compute) : view(v) {
    const bool same_dtype = v.dtype == compute;
    if (same_dtype && v.is_dense(Layout::kNHWC)) {
      data = v.data;
    } else if (same_dtype && variant.layouts == Layouts::kAny && v.is_dense(Layout::kNCHW)) {
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
  staging.to_nhwc(parallel, operand.view.data, operand.view.dtype, operand.view.size, operand.view.stride,
                  operand.data, compute);
}

void stage_out(const Operand& operand, DType compute, const Staging& staging, const Parallel& parallel) {
  if (!operand.staged) return;
  staging.from_nhwc(parallel, operand.data, compute, operand.view.data, operand.view.dtype, operand.view.size,
                    operand.view.stride);
}

int64_t workspace_bytes(const Variant& variant, const ConvProblem& problem, const Parallel& parallel) {
  return variant.workspace ? Scratch::padded(variant.workspace(problem, parallel.threads)) : 0;
}

void launch(const Variant& variant, const ConvProblem& problem, const LaunchArgs& args) {
  const char* failure = variant.launch(problem, args);
  STD_TORCH_CHECK(failure == nullptr, "convext_cpu: ", variant.name, " failed on n=", problem.n, " c=", problem.c,
                  " h=", problem.h, " w=", problem.w, " k=", problem.k, " r=", problem.r, " s=", problem.s, ": ",
                  failure);
}

// The weights as the kernel wants them: packed and kept where the caller offers a buffer, dense KCRS otherwise.
struct Weights {
  const Variant& variant;
  const ConvProblem& problem;
  View view;
  const OptionalTensor& packed;
  int64_t version;

  bool packs() const { return variant.pack_format != nullptr && variant.pack_format(problem) != nullptr; }
  bool dense() const { return view.dtype == problem.dtype && view.is_dense(Layout::kNCHW); }
  int64_t dense_bytes() const {
    return dense() ? 0 : Scratch::padded(view.numel() * dtype_size(problem.dtype));
  }
  int64_t packed_bytes() const { return packs() && !packed ? kPackedHeader + variant.packed_size(problem) : 0; }
  int64_t scratch_bytes() const { return dense_bytes() + Scratch::padded(packed_bytes()); }

  const void* get(const Staging& staging, const Parallel& parallel) const {
    auto load = [&]() -> const void* {
      if (dense()) return view.data;
      void* copy = scratch().take(dense_bytes());
      staging.weight_to_dense(parallel, view.data, view.dtype, view.size, view.stride, copy, problem.dtype);
      return copy;
    };
    if (!packs()) return load();
    if (!packed) {
      void* buffer = scratch().take(packed_bytes());
      char* const out = static_cast<char*>(buffer) + kPackedHeader;
      variant.pack(problem, load(), out, parallel);
      return out;
    }
    const int64_t needed = kPackedHeader + variant.packed_size(problem);
    STD_TORCH_CHECK(packed->numel() >= needed, "convext_cpu: packed holds ", packed->numel(), " bytes, not ", needed);
    uint64_t seed = static_cast<uint64_t>(version) * 0x2545F4914F6CDD1Dull;
    for (int i = 0; i < 4; ++i) seed = seed * 31 + static_cast<uint64_t>(view.stride[i]);
    seed = seed * 31 + static_cast<uint64_t>(view.dtype);
    const uint64_t print = fingerprint(view.data, view.numel() * dtype_size(view.dtype), seed);
    return refresh_packed(variant, problem, print, packed->mutable_data_ptr(), parallel, load);
  }
};

// Batch norm in inference and the bias, folded: scale = gamma / sqrt(var + eps), shift = beta + (bias - mean) * scale.
struct BatchNormTensors {
  const OptionalTensor &bias, &mean, &var, &gamma, &beta;
  double eps;

  bool has_norm() const { return mean.has_value(); }
  bool has_any() const { return has_norm() || bias.has_value(); }
  int64_t scratch_bytes(int64_t k, DType compute) const {
    return has_any() ? 3 * Scratch::padded(k * dtype_size(compute)) : 0;
  }

  template <class T>
  void fold(int64_t k, Epilogue& epilogue) const {
    STD_TORCH_CHECK(mean.has_value() == var.has_value(), "convext_cpu: mean and var come together or not at all");
    if (!has_any()) return;
    T* const shift = static_cast<T*>(scratch().take(k * sizeof(T)));
    epilogue.shift = shift;
    load_channels<T>(bias, "bias", k, T(0), shift);
    if (!has_norm()) return;
    T* const scale = static_cast<T*>(scratch().take(k * sizeof(T)));
    T* const part = static_cast<T*>(scratch().take(k * sizeof(T)));
    epilogue.scale = scale;
    load_channels<T>(var, "var", k, T(1), part);
    load_channels<T>(gamma, "gamma", k, T(1), scale);
    for (int64_t i = 0; i < k; ++i) scale[i] /= std::sqrt(part[i] + static_cast<T>(eps));
    load_channels<T>(mean, "mean", k, T(0), part);
    for (int64_t i = 0; i < k; ++i) shift[i] = (shift[i] - part[i]) * scale[i];
    load_channels<T>(beta, "beta", k, T(0), part);
    for (int64_t i = 0; i < k; ++i) shift[i] += part[i];
  }
};

// ---- ops -----------------------------------------------------------------------------------------------------------

Tensor fprop(int64_t variant_index, const Tensor& x, const Tensor& w, const OptionalTensor& packed, int64_t version,
             const OptionalTensor& bias, const OptionalTensor& mean, const OptionalTensor& var,
             const OptionalTensor& gamma, const OptionalTensor& beta, const OptionalTensor& residual,
             std::vector<int64_t> geom, double eps, int64_t activation, bool channels_last) {
  const View xv = view_of(x, "x"), wv = view_of(w, "w");
  STD_TORCH_CHECK(xv.dtype == wv.dtype, "convext_cpu: x and w must have one dtype");
  const Geom g = geom_of(geom);
  ConvProblem problem = make_problem(xv.size[0], xv.size[1], xv.size[2], xv.size[3], wv.size[0], wv.size[2],
                                     wv.size[3], g, xv.dtype);
  STD_TORCH_CHECK(wv.size[1] == problem.c_per_group(), "convext_cpu: w holds ", wv.size[1],
                  " input channels a group, x ", problem.c_per_group());
  const Variant& variant = checked_variant(variant_index, Pass::kFprop, problem);
  const DType compute = problem.dtype;
  Tensor y = empty_activation(problem.n, problem.k, problem.p(), problem.q(), xv.dtype, channels_last);
  if (problem.y_size() == 0) return y;

  const Staging& staging = staging_for(settings().cpu_isa);
  const Parallel& parallel = torch_parallel();
  Operand in(xv, variant, compute), out(view_of(y, "y"), variant, compute);
  std::optional<Operand> addend;
  if (residual) {
    addend.emplace(view_of(*residual, "residual"), variant, compute);
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
  const Weights weights{variant, problem, wv, packed, version};
  const BatchNormTensors norm{bias, mean, var, gamma, beta, eps};
  const ScratchScope scope(in.bytes + out.bytes + (addend ? addend->bytes : 0) + weights.scratch_bytes() +
                           norm.scratch_bytes(problem.k, compute) + workspace_bytes(variant, problem, parallel));
  LaunchArgs args{};
  args.parallel = &parallel;
  args.epilogue.activation = static_cast<Activation>(activation);
  if (compute == DType::kFloat64) {
    norm.fold<double>(problem.k, args.epilogue);
  } else {
    norm.fold<float>(problem.k, args.epilogue);
  }
  args.b = weights.get(staging, parallel);
  stage_in(in, compute, staging, parallel);
  args.a = in.data;
  if (addend) {
    stage_in(*addend, compute, staging, parallel);
    args.epilogue.residual = addend->data;
  }
  if (out.staged) out.data = scratch().take(out.bytes);
  args.out = out.data;
  args.workspace = scratch().take(workspace_bytes(variant, problem, parallel));
  launch(variant, problem, args);
  stage_out(out, compute, staging, parallel);
  return y;
}

Tensor dgrad(int64_t variant_index, const Tensor& dy, const Tensor& w, const OptionalTensor& packed, int64_t version,
             int64_t height, int64_t width, std::vector<int64_t> geom, bool channels_last) {
  const View dyv = view_of(dy, "dy"), wv = view_of(w, "w");
  STD_TORCH_CHECK(dyv.dtype == wv.dtype, "convext_cpu: dy and w must have one dtype");
  const Geom g = geom_of(geom);
  ConvProblem problem = make_problem(dyv.size[0], wv.size[1] * g.groups, height, width, wv.size[0], wv.size[2],
                                     wv.size[3], g, dyv.dtype);
  STD_TORCH_CHECK(dyv.size[1] == problem.k && dyv.size[2] == problem.p() && dyv.size[3] == problem.q(),
                  "convext_cpu: dy must be (", problem.n, ", ", problem.k, ", ", problem.p(), ", ", problem.q(), ")");
  const Variant& variant = checked_variant(variant_index, Pass::kDgrad, problem);
  const DType compute = problem.dtype;
  Tensor dx = empty_activation(problem.n, problem.c, problem.h, problem.w, dyv.dtype, channels_last);
  if (problem.x_size() == 0) return dx;
  if (problem.y_size() == 0) return torch::stable::zero_(dx);

  const Staging& staging = staging_for(settings().cpu_isa);
  const Parallel& parallel = torch_parallel();
  Operand in(dyv, variant, compute), out(view_of(dx, "dx"), variant, compute);
  problem.y_layout = in.layout;
  problem.x_layout = out.layout;
  const Weights weights{variant, problem, wv, packed, version};
  const ScratchScope scope(in.bytes + out.bytes + weights.scratch_bytes() +
                           workspace_bytes(variant, problem, parallel));
  LaunchArgs args{};
  args.parallel = &parallel;
  args.b = weights.get(staging, parallel);
  stage_in(in, compute, staging, parallel);
  args.a = in.data;
  if (out.staged) out.data = scratch().take(out.bytes);
  args.out = out.data;
  args.workspace = scratch().take(workspace_bytes(variant, problem, parallel));
  launch(variant, problem, args);
  stage_out(out, compute, staging, parallel);
  return dx;
}

Tensor wgrad(int64_t variant_index, const Tensor& dy, const Tensor& x, int64_t r, int64_t s,
             std::vector<int64_t> geom) {
  const View dyv = view_of(dy, "dy"), xv = view_of(x, "x");
  STD_TORCH_CHECK(dyv.dtype == xv.dtype, "convext_cpu: dy and x must have one dtype");
  const Geom g = geom_of(geom);
  ConvProblem problem =
      make_problem(xv.size[0], xv.size[1], xv.size[2], xv.size[3], dyv.size[1], r, s, g, xv.dtype);
  STD_TORCH_CHECK(dyv.size[0] == problem.n && dyv.size[2] == problem.p() && dyv.size[3] == problem.q(),
                  "convext_cpu: dy must be (", problem.n, ", ", problem.k, ", ", problem.p(), ", ", problem.q(), ")");
  const Variant& variant = checked_variant(variant_index, Pass::kWgrad, problem);
  const DType compute = problem.dtype;
  Tensor dw = empty_activation(problem.k, problem.c_per_group(), r, s, xv.dtype, false);
  if (problem.w_size() == 0) return dw;
  if (problem.y_size() == 0 || problem.x_size() == 0) return torch::stable::zero_(dw);

  const Staging& staging = staging_for(settings().cpu_isa);
  const Parallel& parallel = torch_parallel();
  Operand a(dyv, variant, compute), b(xv, variant, compute);
  problem.y_layout = a.layout;
  problem.x_layout = b.layout;
  const View out = view_of(dw, "dw");
  const bool direct = out.dtype == compute;
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

}  // namespace
}  // namespace convext

// geom is stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups. `packed` is the cache of packed weights, `version`
// the weight's version counter: see packed_weight.h.
STABLE_TORCH_LIBRARY(convext_cpu, m) {
  m.def(
      "fprop(int variant, Tensor x, Tensor w, Tensor? packed, int version, Tensor? bias, Tensor? mean, Tensor? var, "
      "Tensor? gamma, Tensor? beta, Tensor? residual, int[] geom, float eps, int activation, bool channels_last) "
      "-> Tensor");
  m.def(
      "dgrad(int variant, Tensor dy, Tensor w, Tensor? packed, int version, int height, int width, int[] geom, "
      "bool channels_last) -> Tensor");
  m.def("wgrad(int variant, Tensor dy, Tensor x, int r, int s, int[] geom) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(convext_cpu, CPU, m) {
  m.impl("fprop", TORCH_BOX(&convext::fprop));
  m.impl("dgrad", TORCH_BOX(&convext::dgrad));
  m.impl("wgrad", TORCH_BOX(&convext::wgrad));
}
