// The register tile of weight gradients: rows of K times vectors of columns, summed over pixels (or Winograd's tiles).
//
//   out[i][j] = sum_p dy[p][i] * x[p][j]          p: `vectors` loads of x, one broadcast of dy a row
#pragma once
#include "cpu/simd/registers.h"
#include "gemm.h"

namespace convext::CONVEXT_ISA {
namespace {

template <class T>
struct OuterArgs {
  const T* const* dy;  // pointer to the tile's first filter, one for each pixel
  const T* x;          // pixel p's (vectors * width) columns are at x + p * x_pitch
  int64_t x_pitch;
  int32_t pixels;
  int64_t offset;  // added to every pointer of dy
  T* out;          // (rows, vectors * width)
  bool accumulate;
};

template <class T, int ROWS, int VECTORS>
void outer_tile(const OuterArgs<T>& args) {
  using V = Vec<T>;
  V acc[ROWS][VECTORS];
  unrolled<ROWS, VECTORS>([&](int i, int j) CONVEXT_LAMBDA_INLINE { acc[i][j] = V::zero(); });
  const T* x = args.x;
  for (int32_t p = 0; p < args.pixels; ++p, x += args.x_pitch) {
    const T* dy = args.dy[p] + args.offset;
    add_outer(acc, [&](int i) CONVEXT_LAMBDA_INLINE { return V(dy[i]); },
              [&](int j) CONVEXT_LAMBDA_INLINE { return load(x + j * V::width); });
  }
  unrolled<ROWS, VECTORS>([&](int i, int j) CONVEXT_LAMBDA_INLINE {
    T* to = args.out + (i * VECTORS + j) * V::width;
    store(to, args.accumulate ? acc[i][j] + load(to) : acc[i][j]);
  });
}

template <class T>
using OuterKernel = void (*)(const OuterArgs<T>&);

template <class T>
constexpr TileTable<OuterKernel<T>> outer_table([](auto r, auto v) { return outer_tile<T, r.value, v.value>; });

}  // namespace
}  // namespace convext::CONVEXT_ISA
