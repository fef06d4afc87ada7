// The depthwise tile of small filters: S taps a row, one column apart, STEP (the stride) columns between outputs.
//
// 2 rows x 7 columns of outputs x W channels (1 x 7 where rows share no input row, 4 columns for remainders), channels
// innermost over all blocks, so that memory is walked in its own order. At stride 1:
//
//            j ->                              input rows   filter rows that use them
//   i   [ o o o o o o o ]                          0           a0
//       [ o o o o o o o ]                          1           a1, b0        a: upper output row, b: lower
//   each o: W channels in one register             2           a2, b1
//                                                  3               b2
//
// At stride 2 the lower row lags by two filter rows, and rows in between serve one output row alone. An input vector is
// loaded once for both rows and all taps: 4 * 9 loads for 2 * 7 * 9 FMAs at 3 x 3, 5 * 15 at stride 2.
// Registers at S taps a row: 14 sums + 2 S taps + 1 input = 21 (3 x 3), 25 (5 x 5), 29 (7 x 7) of 32; with 16 registers
// the taps are memory operands. Columns and rows in the padding are skipped, not multiplied by zero.
//
#pragma once
#include "depthwise_tile.h"

namespace convext::CONVEXT_ISA {

// One input row: filter row `a` for the upper outputs, `b` for the lower ones; either may be absent.
template <int S, int STEP, int TH, int TW, bool EDGE, bool UPPER, bool LOWER, class T>
CONVEXT_INLINE void add_row(const Tile<T>& t, const T* in, const compute_t<T>* a, const compute_t<T>* b,
                            VecOf<T> (&sums)[TH][TW]) {
  constexpr int kColumns = (TW - 1) * STEP + S;
  VecOf<T> upper[S], lower[S];
  CONVEXT_UNROLL
  for (int s = 0; s < S; ++s) {
    if (UPPER) upper[s] = load(a + s * t.w_column);
    if (LOWER) lower[s] = load(b + s * t.w_column);
  }
  CONVEXT_UNROLL
  for (int column = 0; column < kColumns; ++column, in += t.in_column) {
    forget_origin(in);
    if (EDGE && !t.column_inside(t.column + column)) continue;
    const VecOf<T> x = load_as(in);
    CONVEXT_UNROLL
    for (int s = 0; s < S; ++s) {
      const int j = (column - s) / STEP;
      if (column < s || (column - s) % STEP != 0 || j >= TW) continue;
      if (UPPER) sums[0][j] = fma(sums[0][j], x, upper[s]);
      if (LOWER) sums[TH - 1][j] = fma(sums[TH - 1][j], x, lower[s]);
    }
  }
}

// Prefetches the outputs of the tile below. Where its pixels are neighbours they are one piece of memory over all
// channels, of which each block prefetches a share, in order.
template <int TH, int TW, class T>
CONVEXT_INLINE void prefetch_outputs_below(const Tile<T>& t, int64_t k, int64_t block) {
  constexpr int64_t kLine = kCacheLine / sizeof(T);
  const bool neighbours = t.out_column == t.k;
  const int64_t step = neighbours ? kLine : t.out_column;
  for (int i = TH; i < 2 * TH; ++i) {
    const T* out = t.out + i * t.out_row + (neighbours ? block * TW * kLine : k);
    CONVEXT_UNROLL
    for (int j = 0; j < TW; ++j, out += step) __builtin_prefetch(out, 1);
  }
}

// The rows of one plane of the input, at `in`, from t.row on, and of one plane of the filters.
template <int S, int STEP, int TH, int TW, bool EDGE, class T>
CONVEXT_INLINE void add_plane(const Tile<T>& t, const T* in, const compute_t<T>* w, VecOf<T> (&sums)[TH][TW]) {
  constexpr int kLag = STEP;  // filter rows by which the lower outputs lag behind the upper ones
  int32_t h = t.row, r = 0;
  const int64_t in_step = t.tap_row_step * t.in_row;
  auto next = [&]() __attribute__((always_inline)) { ++r, h += t.tap_row_step, in += in_step, w += t.w_row; };
  if constexpr (TH == 1) {
    for (; r < t.taps_h; next()) {
      if (t.row_inside(h)) add_row<S, STEP, TH, TW, EDGE, true, false>(t, in, w, w, sums);
    }
  } else {
    for (; r < kLag; next()) {
      if (t.row_inside(h)) add_row<S, STEP, TH, TW, EDGE, true, false>(t, in, w, w, sums);
    }
    for (; r < t.taps_h; next()) {
      if (t.row_inside(h)) add_row<S, STEP, TH, TW, EDGE, true, true>(t, in, w, w - kLag * t.w_row, sums);
    }
    for (; r < t.taps_h + kLag; next()) {
      if (t.row_inside(h)) add_row<S, STEP, TH, TW, EDGE, false, true>(t, in, w, w - kLag * t.w_row, sums);
    }
  }
}

template <class T, int S, int STEP, int TH, int TW, bool EDGE>
CONVEXT_INLINE void window_block(const Tile<T>& t, int64_t block) {
  const int64_t k = tap_block_begin(block, t.k, VecOf<T>::width);
  const compute_t<T>* w = t.packed + block * t.w_block;
  if (t.streams) prefetch_outputs_below<TH, TW>(t, k, block);
  VecOf<T> sums[TH][TW];
  unrolled<TH, TW>([&](int i, int j) CONVEXT_LAMBDA_INLINE { sums[i][j] = VecOf<T>::zero(); });
  const T* in = t.in + k + t.row * t.in_row + t.column * t.in_column;
  for (int32_t l = 0; l < t.taps_d; ++l, in += t.in_plane, w += t.w_plane) {
    add_plane<S, STEP, TH, TW, EDGE>(t, in, w, sums);
  }
  finish<TH, TW, EDGE>(t, k, sums);
}

template <class T, int S, int STEP, int TH, int TW, bool EDGE>
void window_tile(const Tile<T>& first) {
  Tile<T> t = first;  // a copy that no store can alias
  for (int32_t i = 0; i < t.tiles; ++i, t.advance(TW)) {
    for (int64_t block = t.block_begin; block < t.block_end; ++block) window_block<T, S, STEP, TH, TW, EDGE>(t, block);
  }
}

}  // namespace convext::CONVEXT_ISA
