// What the depthwise backward kernels share: both gradients in one pass over x and dy,
//
//   dx[n,h,w,c] = sum_{r,s} dy[n,p,q,c] * w[c,r,s]        dw[c,r,s] = sum_{n,h,w} dy[n,p,q,c] * x[n,h,w,c]
//   where p*stride_h = h + pad_h - r and q*stride_w = w + pad_w - s have whole solutions inside the output
//
// Both sums run over the same pairs of an input pixel and an output pixel, so one walk over the input pixels that loads
// the dy window around each serves both: x and dy are read once, dx is written once, 3 tensors of traffic where two
// kernels need 4. A block walks over a contiguous range of tiles, so that halos hit the first-level cache, keeps its
// share of dw all the while and writes it as one slab; the slabs are added in fixed order. The number of blocks depends
// on the problem alone, so results repeat to the bit anywhere.
#pragma once
#include "cuda/tile/reduce_splits.h"
#include "depthwise.h"

namespace convext::cuda {

constexpr int kPatchW = 4;
constexpr int64_t kBackwardBlocks = 2 * kProcessors;

// How many slabs: one is written and read once, 8 bytes a weight; x, dy and dx are worth ten times that to a split, or
// more.
inline DepthwisePlan split_backward(const ConvProblem& p, const DepthwiseTile& tile, int64_t bytes) {
  const int64_t least_pixels = ceil_div(10 * 8 * int64_t{p.r} * p.s, 3 * bytes);
  return split_tiles(tile, kBackwardBlocks, ceil_div(p.nhw(), least_pixels), p.is_dilated());
}

// Planes of a tile side by side, at least 32 threads each: a warp has one plane.
inline int32_t backward_plane_lanes(const ConvProblem& p, int64_t bytes) {
  return min_of(kDepthwiseThreads / 32, plane_lanes(p.c, int64_t{p.h} * p.w * bytes));
}

// FAMILY: LAYOUTS, reject(p), cost(v, p), splits(p), and launch<DW>(p, dy, x, w, dx, partial, stream), with which dw is
// computed where DW is true, dx where it is not null.
template <class T, class FAMILY>
constexpr Variant backward_variant(const char* name, Pass pass) {
  Variant v = cuda_variant<T>(name, Algorithm::depthwise, pass, FAMILY::LAYOUTS);
  v.reject = FAMILY::reject, v.cost = FAMILY::cost;
  v.launch = [](const ConvProblem& p, const LaunchArgs& args) -> const char* {
    const void* none = nullptr;
    void* nowhere = nullptr;
    return FAMILY::template launch<false>(p, args.a, none, args.b, args.out, nowhere, args.stream);
  };
  if (pass == Pass::kDgrad) return v;
  v.wgrad_writes_dx = true;
  v.workspace = [](const ConvProblem& p, int32_t) -> int64_t {
    return FAMILY::splits(p) * p.w_size() * static_cast<int64_t>(sizeof(accumulate_t<T>));
  };
  v.launch = [](const ConvProblem& p, const LaunchArgs& args) -> const char* {
    const char* error = FAMILY::template launch<true>(p, args.a, args.b, args.w, args.dx, args.workspace, args.stream);
    if (error) return error;
    return launch_reduce_splits<T>(args.workspace, args.out, p.w_size(), static_cast<int32_t>(FAMILY::splits(p)),
                                   args.stream);
  };
  return v;
}

// Both variants of a family, in namespace convext.
#define CONVEXT_DEPTHWISE(T, dtype, form, ...)                                                           \
  extern const Variant dgrad_depthwise_##dtype##_##form##_sm80 =                                         \
      cuda::backward_variant<T, __VA_ARGS__>("dgrad_depthwise_" #dtype "_" #form "_sm80", Pass::kDgrad); \
  extern const Variant wgrad_depthwise_##dtype##_##form##_sm80 =                                         \
      cuda::backward_variant<T, __VA_ARGS__>("wgrad_depthwise_" #dtype "_" #form "_sm80", Pass::kWgrad);

}  // namespace convext::cuda
