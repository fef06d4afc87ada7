// One 2-D convolution, and the three passes over it. Plain data and index maps that host and device code share.
//
//   fprop  y[n,p,q,k]  = sum_{r,s,c} x[n,h,w,c]  * w[k,r,s,c]
//   dgrad  dx[n,h,w,c] = sum_{r,s,k} dy[n,p,q,k] * w[k,r,s,c]
//   wgrad  dw[k,r,s,c] = sum_{n,p,q} dy[n,p,q,k] * x[n,h,w,c]
//   where  h = p*stride_h - pad_h + r*dil_h   and   w = q*stride_w - pad_w + s*dil_w
//
// A tap (r, s) whose h or w falls outside the image meets padding and contributes nothing.
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
// Memory order of an activation tensor: kNCHW is torch.contiguous_format, kNHWC is torch.channels_last.
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

  // Output height: PyTorch's formula. CUTLASS states the same one two ways.
  CONVEXT_HD constexpr int32_t p() const { return (h + 2 * pad_h - dil_h * (r - 1) - 1) / stride_h + 1; }
  CONVEXT_HD constexpr int32_t q() const { return (w + 2 * pad_w - dil_w * (s - 1) - 1) / stride_w + 1; }

  CONVEXT_HD constexpr int32_t c_per_group() const { return c / groups; }
  CONVEXT_HD constexpr int32_t k_per_group() const { return k / groups; }

  CONVEXT_HD constexpr int64_t npq() const { return int64_t{n} * p() * q(); }
  CONVEXT_HD constexpr int64_t nhw() const { return int64_t{n} * h * w; }
  CONVEXT_HD constexpr int64_t x_size() const { return nhw() * c; }
  CONVEXT_HD constexpr int64_t y_size() const { return npq() * k; }
  CONVEXT_HD constexpr int64_t w_size() const { return int64_t{k} * r * s * c_per_group(); }

  CONVEXT_HD constexpr bool is_depthwise() const { return groups == c && c_per_group() == 1 && k % c == 0; }
  CONVEXT_HD constexpr bool is_pointwise() const { return r == 1 && s == 1; }
  CONVEXT_HD constexpr bool is_dilated() const { return (r > 1 && dil_h > 1) || (s > 1 && dil_w > 1); }
  CONVEXT_HD constexpr bool is_unit_stride() const { return stride_h == 1 && stride_w == 1; }

  // Where tap r (s) of output row p (column q) reads: may be negative or past the end, which is padding.
  CONVEXT_HD constexpr int32_t h_of(int32_t p_, int32_t r_) const { return p_ * stride_h - pad_h + r_ * dil_h; }
  CONVEXT_HD constexpr int32_t w_of(int32_t q_, int32_t s_) const { return q_ * stride_w - pad_w + s_ * dil_w; }

  CONVEXT_HD constexpr DType accumulate_dtype() const { return convext::accumulate_dtype(dtype); }

  CONVEXT_HD constexpr GemmShape gemm_shape(Pass pass) const {
    const int64_t cg = c_per_group(), kg = k_per_group(), rs = int64_t{r} * s;
    switch (pass) {
      case Pass::kFprop: return {npq(), kg, rs * cg};
      case Pass::kDgrad: return {nhw(), cg, rs * kg};
      default: return {kg, rs * cg, npq()};
    }
  }

  // Multiplies and adds of any pass, taps in the padding counted.
  CONVEXT_HD constexpr double flops() const { return 2.0 * npq() * k * r * s * c_per_group(); }
};

}  // namespace convext
