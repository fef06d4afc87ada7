// A register tile whose rows are a constant distance apart in memory, with its epilogue: what stems and pointwise
// layers of few channels are made of.
//
//   out[i][j] = sum_t a_t[i] * b_t[j]          i rows, j lanes
//
// Where a convolution reaches its rows through a table of pointers (gemm.h), 14 rows need 14 pointers, which spill;
// here five reach them all. That matters where an output is a short sum and a vector of filters or two.
#pragma once
#include "cpu/simd/registers.h"
#include "gemm.h"
#include "tile_epilogue.h"

namespace convext::CONVEXT_ISA {

constexpr int kStridedVectors = kVectorRegisters == 32 ? 3 : 2;

struct StridedTile {
  const float* x;   // tap t reads x + offset[t]
  int64_t x_pitch;  // with filters in lanes: from a row to the next, in elements
  const int32_t* offset;
  int32_t taps;
  const float* w;  // tap t's weights are at w + t * w_pitch
  int64_t w_pitch;
  float* out;  // row i is at out + i * out_pitch
  int64_t out_pitch;
  int32_t lanes;          // that exist
  const float* scale;     // for the tile's first filter, or nullptr
  const float* shift;     // for the tile's first filter, or nullptr
  const float* residual;  // for out, or nullptr
  Activation activation;
};

// The elements first[i * pitch], 0 <= i < 14, through five pointers: an address is a pointer plus 1, 2, 4 or 8 pitches.
struct EqualSteps {
  const float *at0, *at3, *at6, *at9, *at12;
  int64_t pitch;

  CONVEXT_INLINE EqualSteps(const float* first, int64_t step)
      : at0(first),
        at3(first + 3 * step),
        at6(at3 + 3 * step),
        at9(at6 + 3 * step),
        at12(at9 + 3 * step),
        pitch(step) {}

  CONVEXT_INLINE float operator[](int i) const {
    switch (i) {
      case 0: return at0[0];
      case 1: return at0[pitch];
      case 2: return at0[2 * pitch];
      case 3: return at3[0];
      case 4: return at0[4 * pitch];
      case 5: return at3[2 * pitch];
      case 6: return at6[0];
      case 7: return at3[4 * pitch];
      case 8: return at0[8 * pitch];
      case 9: return at9[0];
      case 10: return at6[4 * pitch];
      case 11: return at3[8 * pitch];
      case 12: return at12[0];
      default: return at12[pitch];
    }
  }
};

template <bool FILTERS_IN_LANES, int ROWS, int VECTORS>
void strided_tile(const StridedTile& args) {
  using V = Vec<float>;
  const TileColumns<float, VECTORS> columns(args.lanes);
  V acc[ROWS][VECTORS];
  unrolled<ROWS, VECTORS>([&](int i, int j) CONVEXT_LAMBDA_INLINE { acc[i][j] = V::zero(); });
  const float* w = args.w;
  for (int32_t t = 0; t < args.taps; ++t, w += args.w_pitch) {
    const float* x = args.x + args.offset[t];
    const EqualSteps a(FILTERS_IN_LANES ? x : w, FILTERS_IN_LANES ? args.x_pitch : 1);
    const float* b = FILTERS_IN_LANES ? w : x;
    add_outer(acc, [&](int i) CONVEXT_LAMBDA_INLINE { return V(a[i]); },
              [&](int j) CONVEXT_LAMBDA_INLINE { return load(b + j * V::width); });
  }

  const auto of_filter = [&](const float* values, int i, int j) CONVEXT_LAMBDA_INLINE {
    return FILTERS_IN_LANES ? columns.load(values, j) : V(values[i]);
  };
  if (args.scale && args.shift) {  // batch norm
    unrolled<VECTORS, ROWS>([&](int j, int i) CONVEXT_LAMBDA_INLINE {
      acc[i][j] = fma(of_filter(args.shift, i, j), acc[i][j], of_filter(args.scale, i, j));
    });
  } else if (args.scale) {
    unrolled<VECTORS, ROWS>([&](int j, int i)
                                CONVEXT_LAMBDA_INLINE { acc[i][j] = acc[i][j] * of_filter(args.scale, i, j); });
  } else if (args.shift) {
    unrolled<VECTORS, ROWS>([&](int j, int i) CONVEXT_LAMBDA_INLINE { acc[i][j] += of_filter(args.shift, i, j); });
  }
  if (args.residual) {
    unrolled<ROWS, VECTORS>(
        [&](int i, int j) CONVEXT_LAMBDA_INLINE { acc[i][j] += columns.load(args.residual + i * args.out_pitch, j); });
  }
  const Clamp<float> clamp(args.activation);
  const auto clamped = clamp.of_vectors();
  unrolled<ROWS, VECTORS>(
      [&](int i, int j) CONVEXT_LAMBDA_INLINE { columns.store(args.out + i * args.out_pitch, j, clamped(acc[i][j])); });
  if (!clamp.exact) activate(args.activation, args.out, args.out_pitch, ROWS, args.lanes);
}

using StridedKernel = void (*)(const StridedTile&);

template <bool FILTERS_IN_LANES>
inline constexpr TileTable<StridedKernel, kStridedVectors> strided_tiles([](auto r, auto v) {
  return strided_tile<FILTERS_IN_LANES, r.value, v.value>;
});

}  // namespace convext::CONVEXT_ISA
