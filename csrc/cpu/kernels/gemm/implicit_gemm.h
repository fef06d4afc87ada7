// Convolution as a matrix product whose left matrix is never built: fprop and dgrad, every filter, stride, dilation,
// padding and group count, over NHWC activations and packed weights.
//
//   out[m, :] = epilogue( sum_{tap} in[pixel(m, tap), :] * B[tap] )        m runs over a grid of output pixels
//
//   A  (M = pixels of the grid, taps * depth)  gathered through a table of pointers; padding points to a row of zeros
//   B  (taps * depth, columns)                 packed once, panel by panel: [group][panel][tap][depth][vectors * width]
//   C  (M, columns)                            the output tensor itself, also between two parts of a long reduction;
//                                              where its type would round the sums (bfloat16), a block of floats
//
// One item of work is a block of pixels times a run of panels; items are a function of the problem alone, so results do
// not depend on the number of threads. Inside an item:
//
//   for each panel of B                               columns of the register tile
//     for each part of the reduction, 32 KiB of B     stays in the first-level cache ...
//       for each tile of pixels                       ... while the block's tiles pass over it
//
// A tile skips every tap that meets nothing but padding for all of its pixels.
#pragma once
#include "core/axis.h"
#include "gemm.h"

namespace convext::CONVEXT_ISA {

template <class T>
struct ImplicitGemm {
  const T* in;      // (batch, planes.in, height.in, width.in, in_pitch)
  T* out;           // (batch, planes.out, height.out, width.out, out_pitch)
  const T* packed;  // pack_panels() made it
  const T* zeros;   // in_pitch zeros
  int32_t batch;
  Axis planes, height, width;
  int32_t filter_height, filter_width;  // of the packed weights: tap (t, r, s) is number (t * height + r) * width + s
  int32_t packed_taps;                  // taps that the packed weights hold
  int32_t in_pitch, out_pitch;
  int32_t groups, depth, columns;  // depth and columns of one group
  Epilogue epilogue;
  bool tiles_within_rows;  // no tile straddles two rows of the grid: more taps can be skipped
};

template <class T>
void run_implicit_gemm(const ImplicitGemm<T>&, const Parallel&);

// Elements of the packed weights of `groups` times (taps, depth, columns).
template <class T>
int64_t packed_elements(int32_t groups, int64_t taps, int32_t depth, int32_t columns);

// Packs weight(g, column, l, tap) = w[g * group_pitch + column * column_pitch + l * depth_pitch + tap]. Every
// `merged_taps` neighbouring taps become one of that many times the depth.
template <class T>
void pack_panels(const T* w, int64_t group_pitch, int64_t column_pitch, int64_t depth_pitch, int32_t groups,
                 int32_t taps, int32_t merged_taps, int32_t depth, int32_t columns, T* packed, const Parallel&);

}  // namespace convext::CONVEXT_ISA
