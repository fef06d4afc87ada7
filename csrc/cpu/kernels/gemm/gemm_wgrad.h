// The weight gradient as a matrix product that reduces over pixels:
//
//   dw[k, (t,r,s,c)] = sum_{n,z,p,q} dy[(n,z,p,q), k] * x[pixel((n,z,p,q), t, r, s), c]
//
//   A  (K, NZPQ)    dy as it lies in memory: row k of a tile is one element of each pixel, broadcast
//   B  (NZPQ, TRSC) x, gathered slab by slab: 96 pixels times one panel of columns in 24 KiB of the first-level cache,
//                   where all tiles of K pass over it. Pixels that meet nothing but padding are left out of the slab,
//                   so a dilated filter costs what its taps inside the image cost.
//   C  (K, TRSC)    partial sums in the workspace, turned into KCRS at the end
//
// One item of work is a panel of (t,r,s,c) columns times a fixed share of the pixels; the shares are a function of the
// problem alone and their partial sums are added in a fixed order, so results do not depend on the number of threads.
#pragma once
#include "cpu/kernels/family.h"
#include "gemm.h"

namespace convext::CONVEXT_ISA {

template <class T>
int64_t wgrad_workspace(const ConvProblem&, int32_t threads);

template <class T>
const char* wgrad_launch(const ConvProblem&, const LaunchArgs&);

}  // namespace convext::CONVEXT_ISA
