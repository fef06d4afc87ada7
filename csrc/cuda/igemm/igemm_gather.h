// Brings the operands of fprop and dgrad into shared memory element by element, from any strides: odd channel counts,
// NCHW. The reduction is not padded at every tap, only once.
#pragma once
#include "igemm_block.h"

namespace convext::cuda {

// Where in the reduction a thread stands: channels innermost, then the taps of a row, then the rows.
struct Reduction {
  int32_t channel, s, r;

  CONVEXT_DEVICE void advance(int32_t by, int32_t channels, const Range& taps_w) {
    channel += by;
    while (channel >= channels) {
      channel -= channels;
      if (++s == taps_w.end) s = taps_w.begin, ++r;
    }
  }
};

template <class TILE, bool DGRAD>
struct GatherLoader {
  using T = typename TILE::T;
  static constexpr int CHUNK = TILE::CHUNK, BLOCK_K = TILE::BLOCK_K, K_CHUNKS = TILE::K_CHUNKS;
  static constexpr int A_STRIDE = TILE::THREADS / K_CHUNKS, A_ROWS = TILE::BLOCK_M / A_STRIDE;
  static constexpr int B_CHUNKS = TILE::BLOCK_N / CHUNK;  // of a row of the N-major tile
  static constexpr int B_STRIDE = DGRAD ? TILE::THREADS / B_CHUNKS : A_STRIDE;
  static constexpr int B_ROWS = ((DGRAD ? BLOCK_K : TILE::BLOCK_N) + B_STRIDE - 1) / B_STRIDE;

  const PixelsBlock<TILE, DGRAD> block;  // by value: a reference costs registers
  const Strides in_strides;
  const T *in, *w;
  int32_t filter_columns, filter_rows;
  Range taps_h, taps_w;
  int32_t tap_count, steps;
  // A: this thread's chunk of the reduction, and its pixels.
  int a_chunk, a_row;
  int64_t a_base[A_ROWS];
  int32_t a_h[A_ROWS], a_w[A_ROWS];
  Reduction a_at;
  // B: fprop shares A's place in the reduction; dgrad has one for each of its rows.
  int b_chunk, b_row;
  Reduction b_at[DGRAD ? B_ROWS : 1];

  CONVEXT_DEVICE GatherLoader(const ConvProblem& problem, const PixelsBlock<TILE, DGRAD>& of, const Strides& strides,
                              const T* input, const T* weights, int32_t, uint32_t)
      : block(of), in_strides(strides), in(input), w(weights), filter_columns(problem.s), filter_rows(problem.r) {
    const int tid = static_cast<int>(keep(threadIdx.x));
    block.active(taps_h, taps_w);
    tap_count = (taps_h.end - taps_h.begin) * (taps_w.end - taps_w.begin);
    steps = static_cast<int32_t>((int64_t{tap_count} * block.channels + BLOCK_K - 1) / BLOCK_K);
    const Reduction start{0, taps_w.begin, tap_count ? taps_h.begin : taps_h.end};

    a_chunk = tid % K_CHUNKS, a_row = tid / K_CHUNKS;
#pragma unroll
    for (int i = 0; i < A_ROWS; ++i) {
      const int32_t m = block.m0 + a_row + i * A_STRIDE;
      int32_t n = 0, row = 0, col = 0;
      if (m < block.gemm_m) block.decode(m, n, row, col);
      a_h[i] = m < block.gemm_m ? block.rows.input(row, 0) : INT32_MIN / 2;  // never inside
      a_w[i] = block.cols.input(col, 0);
      a_base[i] = n * in_strides.n + int64_t{block.group} * block.channels * in_strides.c +
                  int64_t{a_h[i]} * in_strides.h + int64_t{a_w[i]} * in_strides.w;
    }
    a_at = start;
    if (tap_count) a_at.advance(a_chunk * CHUNK, block.channels, taps_w);

    b_chunk = DGRAD ? tid % B_CHUNKS : a_chunk, b_row = DGRAD ? tid / B_CHUNKS : a_row;
    if constexpr (DGRAD) {
#pragma unroll
      for (int i = 0; i < B_ROWS; ++i) {
        b_at[i] = start;
        if (tap_count) b_at[i].advance(b_row + i * B_STRIDE, block.channels, taps_w);
      }
    }
  }

  // Channels, and filters, of a group.
  CONVEXT_DEVICE int32_t tap_size() const { return DGRAD ? block.columns : block.channels; }
  CONVEXT_DEVICE int32_t filters() const { return DGRAD ? block.channels : block.columns; }

  CONVEXT_DEVICE const T* read_in(int i, const Reduction& at, bool& inside) const {
    const Axis &rows = block.rows, &cols = block.cols;
    const int32_t h = a_h[i] + at.r * rows.in_tap_step, column = a_w[i] + at.s * cols.in_tap_step;
    inside = at.r < taps_h.end && h >= 0 && h < rows.in && column >= 0 && column < cols.in;
    return in + (inside ? a_base[i] + int64_t{at.r} * rows.in_tap_step * in_strides.h +
                              int64_t{at.s} * cols.in_tap_step * in_strides.w + at.channel * in_strides.c
                        : 0);
  }
  CONVEXT_DEVICE const T* read_w(int32_t k, int32_t c, const Reduction& at, bool& inside) const {
    inside = inside && at.r < taps_h.end;
    const int64_t tap = int64_t{block.rows.tap(at.r)} * filter_columns + block.cols.tap(at.s);
    const int64_t filter = (int64_t{block.group} * filters() + k) * filter_rows * filter_columns;
    return w + (inside ? (filter + tap) * tap_size() + c : 0);
  }

  // One 16-byte chunk of A: channels from `at` on of pixel i.
  CONVEXT_DEVICE void load_a(uint32_t tile, int i) const {
    Vector<T> chunk;
    Reduction element = a_at;
#pragma unroll
    for (int e = 0; e < CHUNK; ++e) {
      bool inside;
      const T* source = read_in(i, element, inside);
      chunk.v[e] = inside ? __ldg(source) : from_accumulate<T>(0);
      if (tap_count) element.advance(1, block.channels, taps_w);
    }
    store_chunk(tile + k_major_offset<TILE::ROW_BYTES>(a_row + i * A_STRIDE, a_chunk), chunk);
  }

  // One 16-byte chunk of B, along the reduction in fprop and along the columns in dgrad.
  CONVEXT_DEVICE void load_b(uint32_t tile, int row, const Reduction& place) const {
    const int32_t column = block.n0 + (DGRAD ? b_chunk * CHUNK : row);
    Vector<T> chunk;
    Reduction element = place;
#pragma unroll
    for (int e = 0; e < CHUNK; ++e) {
      bool inside = column + (DGRAD ? e : 0) < block.columns;
      const T* source = DGRAD ? read_w(element.channel, column + e, element, inside)
                              : read_w(column, element.channel, element, inside);
      chunk.v[e] = inside ? __ldg(source) : from_accumulate<T>(0);
      if (!DGRAD && tap_count) element.advance(1, block.channels, taps_w);
    }
    store_chunk(tile + (DGRAD ? mn_major_offset<T, TILE::BLOCK_N>(row, b_chunk)
                              : k_major_offset<TILE::ROW_BYTES>(row, b_chunk)),
                chunk);
  }

  // Loads the next BLOCK_K of the reduction into a stage, and moves on.
  CONVEXT_DEVICE void load_stage(uint32_t stage) {
#pragma unroll
    for (int i = 0; i < A_ROWS; ++i) load_a(stage, i);
#pragma unroll
    for (int i = 0; i < B_ROWS; ++i) {
      const int row = b_row + i * B_STRIDE;
      if (row >= (DGRAD ? BLOCK_K : TILE::BLOCK_N)) break;
      load_b(stage + TILE::A_BYTES, row, DGRAD ? b_at[i] : a_at);
    }
    a_at.advance(BLOCK_K, block.channels, taps_w);
    if constexpr (DGRAD) {
#pragma unroll
      for (int i = 0; i < B_ROWS; ++i) b_at[i].advance(BLOCK_K, block.channels, taps_w);
    }
  }
};

}  // namespace convext::cuda
