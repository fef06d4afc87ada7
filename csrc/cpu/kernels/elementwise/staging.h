// Copies between memory layouts and dtypes: how an activation or a weight that a kernel does not read as it lies
// reaches it, and how the result goes back. One table of functions for each instruction set; staging_for() picks.
#pragma once
#include "core/isa_table.h"

namespace convext {

struct Staging {
  // dst[i] = src[i] for every i of a 4-D index space, each side with its own element strides and dtype. Values are
  // rounded to the nearest, ties to even; NaN stays NaN. src may have strides of 0; dst's elements must be distinct and
  // must not overlap src's. Parallel over blocks.
  void (*copy)(const Parallel&, const void* src, DType src_dtype, const int64_t* src_stride, void* dst, DType dst_dtype,
               const int64_t* dst_stride, const int64_t* size);

  // Logical (N, C, H, W) of any strides to dense NHWC, and back. `size` and `stride` hold 4 values each.
  void to_nhwc(const Parallel& parallel, const void* src, DType src_dtype, const int64_t* size, const int64_t* stride,
               void* dst, DType dst_dtype) const {
    const int64_t dense[4] = {size[1] * size[2] * size[3], 1, size[3] * size[1], size[1]};
    copy(parallel, src, src_dtype, stride, dst, dst_dtype, dense, size);
  }
  void from_nhwc(const Parallel& parallel, const void* src, DType src_dtype, void* dst, DType dst_dtype,
                 const int64_t* size, const int64_t* stride) const {
    const int64_t dense[4] = {size[1] * size[2] * size[3], 1, size[3] * size[1], size[1]};
    copy(parallel, src, src_dtype, dense, dst, dst_dtype, stride, size);
  }

  // Weights (K, C, R, S) of any strides to dense KCRS, and back.
  void weight_to_dense(const Parallel& parallel, const void* src, DType src_dtype, const int64_t* size,
                       const int64_t* stride, void* dst, DType dst_dtype) const {
    const int64_t dense[4] = {size[1] * size[2] * size[3], size[2] * size[3], size[3], 1};
    copy(parallel, src, src_dtype, stride, dst, dst_dtype, dense, size);
  }
  void weight_from_dense(const Parallel& parallel, const void* src, DType src_dtype, void* dst, DType dst_dtype,
                         const int64_t* size, const int64_t* stride) const {
    const int64_t dense[4] = {size[1] * size[2] * size[3], size[2] * size[3], size[3], 1};
    copy(parallel, src, src_dtype, dense, dst, dst_dtype, stride, size);
  }
};

CONVEXT_ISA_TABLE(Staging, staging)

}  // namespace convext
