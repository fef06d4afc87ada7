// A tile of depthwise outputs: where its operands lie, and what happens to its sums on their way to memory. The tiles
// themselves are in depthwise_window.h and depthwise_general.h, who calls them in depthwise_taps.cpp.
#pragma once
#include "cpu/simd/registers.h"
#include "depthwise_taps.h"

namespace convext::CONVEXT_ISA {

template <class T>
struct TileEpilogue {
  using C = compute_t<T>;
  const C *scale, *shift;
  const T* residual;
  Clamp<C> clamp;
  Activation activation;

  explicit TileEpilogue(const Epilogue& e)
      : scale(static_cast<const C*>(e.scale)),
        shift(static_cast<const C*>(e.shift)),
        residual(static_cast<const T*>(e.residual)),
        clamp(e.activation),
        activation(e.activation) {}
};

// Everything a tile needs to know: the first output's place and the steps between neighbours, in elements.
template <class T>
struct Tile {
  TileEpilogue<T> epilogue;
  const T* in;                                               // image n, the first plane that a tap meets, channel 0
  const compute_t<T>* packed;                                // of block 0, the first tap of that plane
  T* out;                                                    // first output of the tile, channel 0
  const T* residual;                                         // as out, or nullptr
  int64_t in_plane, in_row, in_column, out_row, out_column;  // in_plane: between planes that taps meet
  int64_t w_plane, w_row, w_column, w_block;
  int32_t row, column, rows, columns;  // first input row and column (may be negative), and the input's extents
  int32_t row_step, column_step;       // between outputs
  int32_t tap_row_step, tap_column_step;
  int32_t taps_d, taps_h, taps_w;  // taps_d: those inside the input alone
  int32_t valid;                   // columns of the tile that exist
  int32_t tiles;                   // that many side by side
  bool streams;                    // input and output come from memory, not from a cache
  int32_t block_begin, block_end;
  int64_t k;
  int32_t multiplier;

  void advance(int32_t count) {
    column += count * column_step;
    out += count * out_column;
    if (residual) residual += count * out_column;
  }
  bool row_inside(int32_t h) const { return static_cast<uint32_t>(h) < static_cast<uint32_t>(rows); }
  bool column_inside(int32_t w) const { return static_cast<uint32_t>(w) < static_cast<uint32_t>(columns); }
};

// Hides from the compiler how a pointer came about. Walking a row of pixels by one pointer costs an addition a pixel;
// left alone, the compiler works out all their addresses ahead of the loop, and reads them back from the stack.
template <class P>
CONVEXT_INLINE void forget_origin(P*& p) {
  asm("" : "+r"(p));
}

// out = act(z + residual) for rows x columns of vectors z, for the epilogues that are more than a clamp.
template <class T, class... MaybeLanes>
__attribute__((noinline)) void activate(const Tile<T>& t, int64_t k, int32_t rows, int32_t columns,
                                        const compute_t<T>* z, int32_t z_row, MaybeLanes... lanes) {
  visit_activation<VecOf<T>>(t.epilogue.activation, [=, &t](auto act) {
    const int64_t step = t.out_column;
    for (int32_t i = 0; i < rows; ++i) {
      const compute_t<T>* from = z + i * z_row;
      const T* residual = t.residual ? t.residual + i * t.out_row + k : nullptr;
      T* out = t.out + i * t.out_row + k;
      for (int32_t j = 0; j < columns; ++j, from += VecOf<T>::width, out += step) {
        VecOf<T> sum = load(from);
        if (residual) sum = sum + load_as(residual + j * step, lanes...);
        store_as(out, act.forward(sum), lanes...);
      }
    }
  });
}

// epilogue(sums) to memory. Lanes is absent where all W channels exist.
template <int TH, int TW, bool EDGE, class T, class... MaybeLanes>
CONVEXT_INLINE void finish(const Tile<T>& t, int64_t k, VecOf<T> (&sums)[TH][TW], MaybeLanes... lanes) {
  using C = compute_t<T>;
  const TileEpilogue<T>& e = t.epilogue;
  const VecOf<T> scale = e.scale ? load(e.scale + k, lanes...) : VecOf<T>(C(1));
  const VecOf<T> shift = e.shift ? load(e.shift + k, lanes...) : VecOf<T>::zero();
  if (e.clamp.exact && !t.residual) {
    const auto clamped = e.clamp.of_vectors();
    CONVEXT_UNROLL
    for (int i = 0; i < TH; ++i) {
      T* out = t.out + i * t.out_row + k;
      CONVEXT_UNROLL
      for (int j = 0; j < TW; ++j, out += t.out_column) {
        if (EDGE && j >= t.valid) break;
        forget_origin(out);
        store_as(out, clamped(fma(shift, sums[i][j], scale)), lanes...);
      }
    }
    return;
  }
  alignas(kVectorBytes) C z[TH * TW * VecOf<T>::width];
  unrolled<TH, TW>([&](int i, int j) CONVEXT_LAMBDA_INLINE {
    store(z + (i * TW + j) * VecOf<T>::width, fma(shift, sums[i][j], scale));
  });
  activate(t, k, TH, EDGE ? t.valid : TW, z, TW * VecOf<T>::width, lanes...);
}

}  // namespace convext::CONVEXT_ISA
