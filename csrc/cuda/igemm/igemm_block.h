// Which pixels and taps a block of the implicit GEMM works on (igemm_pixels.h).
#pragma once
#include "core/axis.h"
#include "cuda/tile/gemm.h"
#include "cuda/tile/strides.h"
#include "igemm_tiles.h"

namespace convext::cuda {

// Of a problem: those of the last tile fit into 32 bits though it goes past the last pixel.
constexpr int64_t kMostPixels = INT32_MAX - 1024;

struct Range {
  int32_t begin, end;
};

// The taps that meet the image for some position in [low, high]: a range, since the read moves one way with the tap.
CONVEXT_DEVICE Range active_taps(const Axis& axis, int32_t low, int32_t high) {
  const auto meets = [&](int32_t tap) { return axis.input(high, tap) >= 0 && axis.input(low, tap) < axis.in; };
  Range range{0, axis.taps};
  while (range.begin < range.end && !meets(range.begin)) ++range.begin;
  while (range.begin < range.end && !meets(range.end - 1)) --range.end;
  return range;
}

struct PixelDecoder {
  FastDiv by_image, by_row;
  PixelDecoder() = default;
  PixelDecoder(int64_t height, int64_t width) : by_image(height * width), by_row(width) {}
  CONVEXT_DEVICE void operator()(int32_t m, int32_t& n, int32_t& i, int32_t& j) const {
    int32_t rest;
    by_image(static_cast<uint32_t>(m), n, rest);
    by_row(static_cast<uint32_t>(rest), i, j);
  }
};

// What a launch divides by, and its axes, worked out on the host: a division on the device is dozens of instructions,
// of 64 bits a call.
struct PixelsPlan {
  AxisClasses heights, widths;
  Axis rows, cols;  // of the first class, the only one without a stride
  FastDiv by_n_tiles, by_stride_w;
  // The classes of dgrad have as many positions along an axis as the first, or one fewer.
  PixelDecoder decode[2][2];

  PixelsPlan(const ConvProblem& p, bool dgrad, int64_t n_tiles)
      : heights(height_of(p, dgrad)),
        widths(width_of(p, dgrad)),
        rows(heights.at(0)),
        cols(widths.at(0)),
        by_n_tiles(n_tiles),
        by_stride_w(widths.count()) {
    for (int h = 0; h < 2; ++h) {
      for (int w = 0; w < 2; ++w) decode[h][w] = {max_of(1, rows.count - h), max_of(1, cols.count - w)};
    }
  }
};

// What a block computes: a tile of one class's pixels times some columns of one group, over the taps that meet the
// image.
template <class TILE, bool DGRAD>
struct PixelsBlock {
  int32_t channels, columns;  // of the reduction, of the result; of one group
  int32_t group, m_tile, n0;
  int32_t m0, gemm_m;
  Axis rows, cols;
  PixelDecoder decode;

  CONVEXT_DEVICE PixelsBlock(const ConvProblem& p, const PixelsPlan& plan, int32_t channels, int32_t columns)
      : channels(channels), columns(columns), group(blockIdx.y), rows(plan.rows), cols(plan.cols) {
    int32_t n_tile;
    plan.by_n_tiles(blockIdx.x, m_tile, n_tile);
    n0 = n_tile * TILE::BLOCK_N;
    if (DGRAD && gridDim.z > 1) {
      int32_t row, col;
      plan.by_stride_w(blockIdx.z, row, col);
      rows = plan.heights.at(row), cols = plan.widths.at(col);
    }
    decode = plan.decode[DGRAD && rows.count != plan.rows.count][DGRAD && cols.count != plan.cols.count];
    // Tiles past the last are those of a class smaller than the first: their start still fits.
    const int64_t start = int64_t{m_tile} * TILE::BLOCK_M;
    gemm_m = rows.count > 0 && cols.count > 0 ? static_cast<int32_t>(int64_t{p.n} * rows.count * cols.count) : 0;
    m0 = start < gemm_m ? static_cast<int32_t>(start) : gemm_m;
  }
  CONVEXT_DEVICE bool is_empty() const { return m0 >= gemm_m; }

  CONVEXT_DEVICE void active(Range& taps_h, Range& taps_w) const {
    const int32_t last = (gemm_m - m0 > TILE::BLOCK_M ? m0 + TILE::BLOCK_M : gemm_m) - 1;
    int32_t n_first, i_first, j_first, n_last, i_last, j_last;
    decode(m0, n_first, i_first, j_first);
    decode(last, n_last, i_last, j_last);
    const bool one_image = n_first == n_last, one_row = one_image && i_first == i_last;
    taps_h = one_image ? active_taps(rows, i_first, i_last) : active_taps(rows, 0, rows.count - 1);
    taps_w = one_row ? active_taps(cols, j_first, j_last) : active_taps(cols, 0, cols.count - 1);
  }
};

}  // namespace convext::cuda
