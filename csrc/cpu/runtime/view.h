// A logical (N, C, H, W) or (N, C, D, H, W) tensor, and the problem that extents and geometry amount to.
#pragma once
#include "check.h"
#include "core/conv_problem.h"

namespace convext {

// Sizes, strides in elements, dtype, data. A volume's planes and rows are one axis, D * H.
struct View {
  int64_t size[4];
  int64_t stride[4];
  DType dtype;
  void* data;
  int64_t planes = 1;  // D

  int64_t rows() const { return planes > 0 ? size[2] / planes : 0; }  // H
  int64_t numel() const { return size[0] * size[1] * size[2] * size[3]; }

  // Dense in the given order; the stride of an extent of one says nothing.
  bool is_dense(Layout layout) const {
    static constexpr int kOrder[2][4] = {{3, 2, 1, 0}, {1, 3, 2, 0}};  // fastest first
    int64_t expected = 1;
    for (int axis : kOrder[static_cast<int>(layout)]) {
      if (size[axis] != 1 && stride[axis] != expected) return false;
      expected *= size[axis];
    }
    return true;
  }

  // at::Tensor::suggest_memory_format: the strides grow in the order C, W, H, N. Where they fit both orders (one
  // channel, one pixel) it returns NCHW.
  bool suggests_nhwc() const {
    if (stride[1] == 0) return false;
    int64_t least = 0;
    for (int axis : {1, 3, 2, 0}) {
      if (size[axis] == 0 || stride[axis] < least) return false;
      if (axis == 0 && least == stride[1]) return false;
      least = stride[axis] * (size[axis] > 1 ? size[axis] : 1);
    }
    return true;
  }
};

struct Geom {
  int32_t stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups;
  int32_t stride_d = 1, pad_d = 0, dil_d = 1;
};

// `values`: a container of the 7 numbers of an image's, or of all 10.
template <class Numbers>
Geom geom_of(const Numbers& values) {
  CONVEXT_CHECK(values.size() == 7 || values.size() == 10, "geom must be 7 or 10 numbers, got ", values.size());
  for (int64_t value : values) {
    CONVEXT_CHECK(value >= 0 && value <= INT32_MAX, "geom holds ", value, ", outside 32 bits");
  }
  auto at = [&](int i) { return static_cast<int32_t>(values[i]); };
  Geom geom{at(0), at(1), at(2), at(3), at(4), at(5), at(6)};
  if (values.size() == 10) geom.stride_d = at(7), geom.pad_d = at(8), geom.dil_d = at(9);
  return geom;
}

inline ConvProblem make_problem(int64_t n, int64_t c, int64_t h, int64_t w, int64_t k, int64_t r, int64_t s,
                                const Geom& g, DType dtype, int64_t d = 1, int64_t t = 1) {
  for (int64_t extent : {n, c, h, w, k, r, s, d, t}) {
    CONVEXT_CHECK(extent <= INT32_MAX, "an extent of ", extent, " exceeds 32 bits");
  }
  CONVEXT_CHECK(g.groups > 0 && c % g.groups == 0 && k % g.groups == 0, c, " input and ", k,
                " output channels do not divide into ", g.groups, " groups");
  CONVEXT_CHECK(g.stride_d > 0 && g.stride_h > 0 && g.stride_w > 0 && g.dil_d > 0 && g.dil_h > 0 && g.dil_w > 0 &&
                    t > 0 && r > 0 && s > 0,
                "stride, dilation and filter extents must be positive");
  ConvProblem problem{};
  problem.n = n, problem.c = c, problem.h = h, problem.w = w;
  problem.k = k, problem.r = r, problem.s = s;
  problem.stride_h = g.stride_h, problem.stride_w = g.stride_w;
  problem.pad_h = g.pad_h, problem.pad_w = g.pad_w;
  problem.dil_h = g.dil_h, problem.dil_w = g.dil_w;
  problem.groups = g.groups;
  problem.d = d, problem.t = t;
  problem.stride_d = g.stride_d, problem.pad_d = g.pad_d, problem.dil_d = g.dil_d;
  problem.dtype = dtype;
  problem.x_layout = problem.y_layout = Layout::kNHWC;
  CONVEXT_CHECK(problem.z() >= 0 && problem.p() >= 0 && problem.q() >= 0,
                "the filter does not fit into the padded input");
  return problem;
}

}  // namespace convext
