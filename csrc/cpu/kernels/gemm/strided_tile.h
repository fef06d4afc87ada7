// A register tile whose rows are a constant distance apart in memory, with its epilogue: what stems and pointwise
// layers of few channels are made of.
//
//   out[i][j] = sum_t a_t[i] * b_t[j]          i rows, j lanes
//
// Where a convolution reaches its rows through a table of pointers (gemm.h), 14 rows need 14 pointers, which spill;
// here five reach them all. That matters where an output is a short sum and a vector of filters or two.
#pragma once
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
  const Lanes<float> tail(args.lanes - (VECTORS - 1) * V::width);
  const bool whole = args.lanes == VECTORS * V::width;
  const auto load_lanes = [&](const float* p, int j) {
    return j == VECTORS - 1 && !whole ? load(p + j * V::width, tail) : load(p + j * V::width);
  };

  V acc[ROWS][VECTORS];
  CONVEXT_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    CONVEXT_UNROLL
    for (int j = 0; j < VECTORS; ++j) acc[i][j] = V::zero();
  }
  const float* w = args.w;
  for (int32_t t = 0; t < args.taps; ++t, w += args.w_pitch) {
    const float* x = args.x + args.offset[t];
    const EqualSteps a(FILTERS_IN_LANES ? x : w, FILTERS_IN_LANES ? args.x_pitch : 1);
    const float* b = FILTERS_IN_LANES ? w : x;
    V lane[VECTORS];
    CONVEXT_UNROLL
    for (int j = 0; j < VECTORS; ++j) lane[j] = load(b + j * V::width);
    CONVEXT_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      const V broadcast(a[i]);
      CONVEXT_UNROLL
      for (int j = 0; j < VECTORS; ++j) acc[i][j] = fma(acc[i][j], broadcast, lane[j]);
    }
  }

  const auto of_filter = [&](const float* values, int i, int j) __attribute__((always_inline)) {
    return FILTERS_IN_LANES ? load_lanes(values, j) : V(values[i]);
  };
  if (args.scale && args.shift) {  // batch norm
    CONVEXT_UNROLL
    for (int j = 0; j < VECTORS; ++j) {
      CONVEXT_UNROLL
      for (int i = 0; i < ROWS; ++i) {
        acc[i][j] = fma(of_filter(args.shift, i, j), acc[i][j], of_filter(args.scale, i, j));
      }
    }
  } else if (args.scale) {
    CONVEXT_UNROLL
    for (int j = 0; j < VECTORS; ++j) {
      CONVEXT_UNROLL
      for (int i = 0; i < ROWS; ++i) acc[i][j] = acc[i][j] * of_filter(args.scale, i, j);
    }
  } else if (args.shift) {
    CONVEXT_UNROLL
    for (int j = 0; j < VECTORS; ++j) {
      CONVEXT_UNROLL
      for (int i = 0; i < ROWS; ++i) acc[i][j] += of_filter(args.shift, i, j);
    }
  }
  if (args.residual) {
    CONVEXT_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      CONVEXT_UNROLL
      for (int j = 0; j < VECTORS; ++j) acc[i][j] += load_lanes(args.residual + i * args.out_pitch, j);
    }
  }
  const Clamp<float> clamp(args.activation);
  const V low(clamp.low), high(clamp.high);
  CONVEXT_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    CONVEXT_UNROLL
    for (int j = 0; j < VECTORS; ++j) {
      const V value = min_keep_nan(max_keep_nan(acc[i][j], low), high);
      float* to = args.out + i * args.out_pitch + j * V::width;
      if (j == VECTORS - 1 && !whole) {
        store(to, value, tail);
      } else {
        store(to, value);
      }
    }
  }
  if (!clamp.exact) activate(args.activation, args.out, args.out_pitch, ROWS, args.lanes);
}

using StridedKernel = void (*)(const StridedTile&);

template <bool FILTERS_IN_LANES>
inline constexpr TileTable<StridedKernel, kStridedVectors> strided_tiles([](auto r, auto v) -> StridedKernel {
  return strided_tile<FILTERS_IN_LANES, decltype(r)::value, decltype(v)::value>;
});

}  // namespace convext::CONVEXT_ISA
