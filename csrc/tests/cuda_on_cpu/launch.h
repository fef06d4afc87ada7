// Every CUDA variant, and a launch of one with all that it may take, for programs that count what kernels do.
#pragma once
#include <cstdio>

#include "cuda/batch_norm/batch_norm.h"
#include "tests/tensor.h"

namespace convext {
#define CONVEXT_CUDA_VARIANT(name) extern const Variant name;
#include "core/variants.inc"

namespace testing {

inline const Variant* const kVariants[] = {
#define CONVEXT_CUDA_VARIANT(name) &name,
#include "core/variants.inc"
};

inline int failures = 0;  // launches that did not run

// One launch with everything that it may need, and what it moved.
struct Run {
  Tensor a, b, out, w, dx, scale, shift, residual;
  DeviceBuffer workspace, stats;
  double bytes = 0;

  static int64_t size(Pass pass, const ConvProblem& p, char which) {
    if (which == 'a') return pass == Pass::kFprop ? p.x_size() : p.y_size();
    if (which == 'b') return pass == Pass::kWgrad ? p.x_size() : p.w_size();
    return pass == Pass::kFprop ? p.y_size() : pass == Pass::kDgrad ? p.x_size() : p.w_size();
  }
  static int64_t stats_bytes(const Variant& v, const ConvProblem& p) {
    // Rounded as an allocator does it: a buffer's end is what lies on a page here.
    return v.stats_rows ? (cuda::partial_stats_bytes(v.stats_rows(p), p.k, p.accumulate_dtype()) + 255) / 256 * 256 : 0;
  }

  Run(const Variant& v, const ConvProblem& p)
      : a(p.dtype, size(v.pass, p, 'a'), false),
        b(p.dtype, size(v.pass, p, 'b'), false),
        out(p.dtype, size(v.pass, p, 'o'), false),
        w(p.dtype, p.w_size(), false),
        dx(p.dtype, p.x_size(), false),
        scale(p.accumulate_dtype(), p.k, false),
        shift(p.accumulate_dtype(), p.k, false),
        residual(p.dtype, p.y_size(), false),
        workspace(v.workspace ? v.workspace(p, 1) : 0),
        stats(stats_bytes(v, p)) {
    LaunchArgs args{};
    args.a = a.buffer.data(), args.b = b.buffer.data(), args.out = out.buffer.data();
    args.workspace = workspace.data();
    if (v.pass == Pass::kFprop) {
      args.epilogue.shift = shift.buffer.data();
      args.epilogue.scale = scale.buffer.data();
      args.epilogue.residual = residual.buffer.data();
      args.epilogue.activation = Activation::relu;
      args.stats = stats.data();
    }
    if (v.wgrad_writes_dx) args.w = w.buffer.data(), args.dx = dx.buffer.data();
    cuda_on_cpu::reset_counters();
    if (const char* error = v.launch(p, args)) {
      printf("FAIL %s: %s\n", v.name, error);
      ++failures;
    }
    const auto& counted = cuda_on_cpu::counters;
    bytes = static_cast<double>(counted.read_bytes + counted.written_bytes - stats.written_bytes());
  }
  double parameter_bytes() const {
    return double(scale.buffer.read_bytes() + shift.buffer.read_bytes() + residual.buffer.read_bytes());
  }
};

}  // namespace testing
}  // namespace convext
