// What the ops of batch-norm passes share: a view's layout, operands that lie so or are copied, the parameters.
#pragma once
#include <cmath>

#include "cpu/kernels/elementwise/batch_norm.h"
#include "cpu/kernels/elementwise/staging.h"
#include "torch_glue.h"

namespace convext {

// The layout the pass runs in is the one y suggests, and the results have it too. Where y lies dense in both (one
// pixel), the same memory is read as NHWC, which has the longer rows.
inline Layout layout_of(const View& y) {
  return y.suggests_nhwc() || y.is_dense(Layout::kNHWC) ? Layout::kNHWC : Layout::kNCHW;
}

inline Tensor empty_like(const View& y) {
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

inline View matching_view(const Tensor& t, const char* name, const View& y) {
  const View v = view_of(t, name);
  STD_TORCH_CHECK(v.dtype == y.dtype, "convext_cpu: ", name, " must have y's dtype");
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(v.size[i] == y.size[i], "convext_cpu: ", name, " must have y's shape");
  }
  return v;
}

inline BatchNormArgs args_of(const View& y, Layout layout) {
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

}  // namespace convext
