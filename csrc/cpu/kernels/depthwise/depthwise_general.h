// The depthwise tile for whatever the window (depthwise_window.h) does not take: dilated columns, filters wider than 7,
// strides above 2, fewer channels than W, a channel multiplier. 1 x 8 outputs x W channels, taps at run time, one load
// for each FMA.
#pragma once
#include "depthwise_input.h"
#include "depthwise_tile.h"

namespace convext::CONVEXT_ISA {

constexpr int kGeneralColumns = 8;

template <bool EDGE, class Input, class T>
CONVEXT_INLINE void general_sums(const Tile<T>& t, const Input& input, int64_t k, const compute_t<T>* w,
                                 VecOf<T> (&sums)[1][kGeneralColumns]) {
  CONVEXT_UNROLL
  for (int j = 0; j < kGeneralColumns; ++j) sums[0][j] = VecOf<T>::zero();
  const T* plane = t.in + k;
  for (int32_t l = 0; l < t.taps_d; ++l, plane += t.in_plane, w += t.w_plane) {
    for (int32_t r = 0; r < t.taps_h; ++r) {
      const int32_t h = t.row + r * t.tap_row_step;
      if (!t.row_inside(h)) continue;
      const T* const in = plane + h * t.in_row;
      for (int32_t s = 0; s < t.taps_w; ++s) {
        const VecOf<T> tap = load(w + r * t.w_row + s * t.w_column);
        const int32_t first = t.column + s * t.tap_column_step;
        CONVEXT_UNROLL
        for (int j = 0; j < kGeneralColumns; ++j) {
          const int32_t column = first + j * t.column_step;
          if (EDGE && (j >= t.valid || !t.column_inside(column))) continue;
          sums[0][j] = fma(sums[0][j], input(in + column * t.in_column), tap);
        }
      }
    }
  }
}

template <class T, class Input, bool EDGE>
CONVEXT_INLINE void general_block(const Tile<T>& t, int64_t block) {
  const int64_t k = tap_block_begin(block, t.k, VecOf<T>::width);
  const Input input(k, t.k, t.multiplier);
  VecOf<T> sums[1][kGeneralColumns];
  general_sums<EDGE>(t, input, k, t.packed + block * t.w_block, sums);
  if constexpr (Input::kWhole) {
    finish<1, kGeneralColumns, EDGE>(t, k, sums);
  } else {
    finish<1, kGeneralColumns, EDGE>(t, k, sums, input.lanes);
  }
}

template <class T, class Input, bool EDGE>
void general_tile(const Tile<T>& first) {
  Tile<T> t = first;  // a copy that no store can alias
  for (int32_t i = 0; i < t.tiles; ++i, t.advance(kGeneralColumns)) {
    for (int64_t block = t.block_begin; block < t.block_end; ++block) general_block<T, Input, EDGE>(t, block);
  }
}

}  // namespace convext::CONVEXT_ISA
