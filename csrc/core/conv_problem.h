// One convolution of images or volumes, and the three passes over it. Plain data and index maps that host and device
// code share.
//
//   fprop  y[n,z,p,q,k]  = sum_{t,r,s,c} x[n,d,h,w,c]  * w[k,t,r,s,c]
//   dgrad  dx[n,d,h,w,c] = sum_{t,r,s,k} dy[n,z,p,q,k] * w[k,t,r,s,c]
//   wgrad  dw[k,t,r,s,c] = sum_{n,z,p,q} dy[n,z,p,q,k] * x[n,d,h,w,c]
//   where  d = z*stride_d - pad_d + t*dil_d,   h = p*stride_h - pad_h + r*dil_h,   w = q*stride_w - pad_w + s*dil_w
//
// A tap (t, r, s) whose d, h or w falls outside the volume meets padding and contributes nothing. An image is a volume
// of one plane with filters of one: D = T = 1 without padding. Rows are images of height one.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define CONVEXT_HD __host__ __device__
#define CONVEXT_HD_INLINE __host__ __device__ __forceinline__
#else
#define CONVEXT_HD
// Never a function of its own: the linker would keep one of several instruction sets' for all.
#define CONVEXT_HD_INLINE inline __attribute__((always_inline))
#endif

namespace convext {

enum class Pass : int32_t { kFprop = 0, kDgrad = 1, kWgrad = 2 };
enum class Device : int32_t { kCPU = 0, kCUDA = 1 };
enum class DType : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
// Memory order of an activation tensor: kNCHW is torch.contiguous_format, kNHWC is torch.channels_last. A volume's planes
// lie one behind the other: N C D H W and N D H W C.
enum class Layout : int32_t { kNCHW = 0, kNHWC = 1 };

CONVEXT_HD constexpr int64_t dtype_size(DType t) { return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : 2; }

// What sums of products, and per-channel arrays, are kept in.
CONVEXT_HD constexpr DType accumulate_dtype(DType t) { return t == DType::kFloat64 ? t : DType::kFloat32; }

// The GEMM that a pass amounts to, per group.
struct GemmShape {
  int64_t m, n, k;
};

struct ConvProblem {
  int32_t n, c, h, w;          // input: batch, channels (all groups), height, width
  int32_t k, r, s;             // filters (all groups), filter height and width
  int32_t stride_h, stride_w;  // step of the filter in the input
  int32_t pad_h, pad_w;        // zeros on each side of the input
  int32_t dil_h, dil_w;        // distance between taps
  int32_t groups;
  DType dtype;                // of x, w, y and their gradients; accumulation is in accumulate_dtype()
  Layout x_layout, y_layout;  // of x and dx, of y and dy

  // The third axis: planes of the input and of the filter, and its step, padding and distance. These are an image's.
  int32_t d = 1, t = 1, stride_d = 1, pad_d = 0, dil_d = 1;

  CONVEXT_HD constexpr bool is_volume() const { return d != 1 || t != 1 || pad_d != 0; }

  // Output height, depth and width: PyTorch's formula. CUTLASS states the same one two ways.
  CONVEXT_HD constexpr int32_t p() const { return (h + 2 * pad_h - dil_h * (r - 1) - 1) / stride_h + 1; }
  CONVEXT_HD constexpr int32_t z() const { return (d + 2 * pad_d - dil_d * (t - 1) - 1) / stride_d + 1; }
  CONVEXT_HD constexpr int32_t q() const { return (w + 2 * pad_w - dil_w * (s - 1) - 1) / stride_w + 1; }

  CONVEXT_HD constexpr int32_t c_per_group() const { return c / groups; }
  CONVEXT_HD constexpr int32_t k_per_group() const { return k / groups; }

  // Pixels of the output and of the input, of all planes; taps of a filter.
  CONVEXT_HD constexpr int64_t npq() const { return int64_t{n} * z() * p() * q(); }
  CONVEXT_HD constexpr int64_t nhw() const { return int64_t{n} * d * h * w; }
  CONVEXT_HD constexpr int64_t taps() const { return int64_t{t} * r * s; }
  CONVEXT_HD constexpr int64_t x_size() const { return nhw() * c; }
  CONVEXT_HD constexpr int64_t y_size() const { return npq() * k; }
  CONVEXT_HD constexpr int64_t w_size() const { return taps() * k * c_per_group(); }

  CONVEXT_HD constexpr bool is_depthwise() const { return groups == c && c_per_group() == 1 && k % c == 0; }
  CONVEXT_HD constexpr bool is_pointwise() const { return t == 1 && r == 1 && s == 1; }
  CONVEXT_HD constexpr bool is_dilated() const {
    return (t > 1 && dil_d > 1) || (r > 1 && dil_h > 1) || (s > 1 && dil_w > 1);
  }
  CONVEXT_HD constexpr bool is_unit_stride() const { return stride_d == 1 && stride_h == 1 && stride_w == 1; }

  // Where tap t (r, s) of output plane z (row p, column q) reads: may be negative or past the end, which is padding.
  CONVEXT_HD constexpr int32_t d_of(int32_t z_, int32_t t_) const { return z_ * stride_d - pad_d + t_ * dil_d; }
  CONVEXT_HD constexpr int32_t h_of(int32_t p_, int32_t r_) const { return p_ * stride_h - pad_h + r_ * dil_h; }
  CONVEXT_HD constexpr int32_t w_of(int32_t q_, int32_t s_) const { return q_ * stride_w - pad_w + s_ * dil_w; }

  CONVEXT_HD constexpr DType accumulate_dtype() const { return convext::accumulate_dtype(dtype); }

  CONVEXT_HD constexpr GemmShape gemm_shape(Pass pass) const {
    const int64_t cg = c_per_group(), kg = k_per_group(), trs = taps();
    switch (pass) {
      case Pass::kFprop: return {npq(), kg, trs * cg};
      case Pass::kDgrad: return {nhw(), cg, trs * kg};
      default: return {kg, trs * cg, npq()};
    }
  }

  // Multiplies and adds of any pass, taps in the padding counted.
  CONVEXT_HD constexpr double flops() const { return 2.0 * npq() * k * taps() * c_per_group(); }
};

// A problem of fewer axes over the same memory, and what it takes for the memory to be the same.
struct Flattened {
  ConvProblem problem;
  bool nhwc_only;  // activations in NCHW lie differently
};

// Where a filter is of one row and column, a plane is one row; where it is of one plane, planes are images. Kernels of
// images serve such volumes. Strides, padding and extents along an axis without taps must leave it as it is.
inline Flattened flattened(const ConvProblem& p) {
  if (!p.is_volume()) return {p, false};
  ConvProblem flat = p;
  flat.d = flat.t = flat.stride_d = flat.dil_d = 1, flat.pad_d = 0;
  const bool rows = p.r == 1 && p.s == 1 && p.stride_h == 1 && p.stride_w == 1 && p.pad_h == 0 && p.pad_w == 0;
  if (rows && int64_t{p.h} * p.w <= INT32_MAX) {
    flat.h = p.d, flat.r = p.t, flat.stride_h = p.stride_d, flat.pad_h = p.pad_d, flat.dil_h = p.dil_d;
    flat.w = p.h * p.w, flat.dil_w = 1;
    return {flat, false};
  }
  if (p.t == 1 && p.stride_d == 1 && p.pad_d == 0 && int64_t{p.n} * p.d <= INT32_MAX) {
    flat.n = p.n * p.d;
    return {flat, true};
  }
  return {p, false};
}

}  // namespace convext
