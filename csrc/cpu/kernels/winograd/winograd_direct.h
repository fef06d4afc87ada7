// Tiles of Winograd's filtering whose outputs are computed again as plain sums, because some of them came out infinite
// or NaN.
//
// The transforms mix the pixels of a patch and the taps of a filter: one NaN reaches every output of its tiles,
// infinity becomes NaN, and finite values near the type's limit overflow although their sum does not. What a plain sum
// says of such a tile is what counts. That no other tile needs it:
//
//   A finite output is right. It is made of sums, differences and products alone, from the operands to the sum before
//   the epilogue, and the result of one of those is finite only if both its operands are: infinity plus or times
//   anything, zero too, is infinite or NaN. So everything that a finite output was made of was finite: no NaN or
//   infinity among the pixels and weights that it read, no overflow on the way.
//
//   An output whose plain sum is not finite because of an operand is not finite here either. With d_i the pixel and g_r
//   the tap that meet in output a, i = a + r, the transforms multiply to  sum_p A_pa G_pr B_pi = 1.  So some position p
//   has all three coefficients, and the output reads both d_i and g_r there.
//
// What is left is a sum that overflows by its order alone, partial sums too large for the type and the end not: there
// any two orders of summing differ.
//
// It takes no more than one kernel with plain sums takes for the same outputs, for any set of tiles: pixels are reached
// through pointers, so that they need not lie side by side. Taps in the padding are left out, pixel by pixel: a weight
// that is infinite contributes nothing where it meets none of the image.
#pragma once
#include <cstdlib>
#include <cstring>

#include "cpu/kernels/gemm/cut.h"
#include "cpu/kernels/gemm/gemm_passes.h"
#include "winograd_tile.h"

namespace convext::CONVEXT_ISA {
namespace {

// Memory that is wanted too rarely to be part of every call's workspace. `data` is nullptr where none is left.
template <class T>
struct RareMemory {
  T* const data;
  explicit RareMemory(int64_t elements)
      : data(static_cast<T*>(std::aligned_alloc(64, align64(elements * int64_t{sizeof(T)} + 1)))) {}
  ~RareMemory() { std::free(data); }
  RareMemory(const RareMemory&) = delete;
  RareMemory& operator=(const RareMemory&) = delete;
};
constexpr const char* kNoMemory = "there is no memory left to compute outputs again that are not finite";

// The outputs of some tiles, those that meet the same taps side by side.
template <int M, class T>
struct DirectOutputs {
  static constexpr int kTiles = 64 / (M * M), kMost = kTiles * M * M, kTaps = 9;

  int32_t count = 0;
  const T* rows[kTaps * kMost];  // what tap t of output i reads at rows[t * kMost + i]; unset where that is padding
  T* out[kMost];
  uint32_t taps[kMost];  // bit t: tap t of the output meets the image

  void add(const Winograd<T>& g, Tile tile) {
    const int32_t height = valid_outputs<M>(g.height, tile.h), width = valid_outputs<M>(g.width, tile.w);
    for (int32_t a = 0; a < height; ++a) {
      for (int32_t b = 0; b < width; ++b) {
        add(g, tile.n, int64_t{tile.h} + int64_t{a} * g.height.step, int64_t{tile.w} + int64_t{b} * g.width.step);
      }
    }
  }

 private:
  void add(const Winograd<T>& g, int64_t n, int64_t h, int64_t w) {
    const T* reads[kTaps];
    uint32_t met = 0;
    for (int t = 0; t < kTaps; ++t) {
      const int64_t row = h + g.height.offset + int64_t{t / 3} * g.height.step;
      const int64_t column = w + g.width.offset + int64_t{t % 3} * g.width.step;
      if (row < 0 || row >= g.height.in || column < 0 || column >= g.width.in) continue;
      reads[t] = g.in + ((n * g.height.in + row) * g.width.in + column) * g.depth;
      met |= 1u << t;
    }
    int32_t at = count++;  // one step of an insertion sort
    for (; at > 0 && taps[at - 1] > met; --at) move(at - 1, at);
    taps[at] = met;
    out[at] = g.out + ((n * g.height.out + h) * g.width.out + w) * g.columns;
    for (int t = 0; t < kTaps; ++t) {
      if (met >> t & 1) rows[t * kMost + at] = reads[t];
    }
  }

  void move(int32_t from, int32_t to) {
    taps[to] = taps[from], out[to] = out[from];
    for (int t = 0; t < kTaps; ++t) {
      if (taps[from] >> t & 1) rows[t * kMost + to] = rows[t * kMost + from];
    }
  }
};

// One panel of columns of the outputs, epilogue included; `packed`: the panel of the weights.
template <int M, class T>
void sum_panel(const Winograd<T>& g, const DirectOutputs<M, T>& outputs, const Panels<T>& split, int32_t panel,
               const T* packed) {
  using C = compute_t<T>;
  using Outputs = DirectOutputs<M, T>;
  constexpr int32_t width = Panels<T>::kWidth;
  [[maybe_unused]] C partial[kPartialInOutput<T> ? 1 : kMaxRows * kMaxVectors * width];
  const int32_t vectors = split.width(panel), lanes = vectors * width;
  int32_t numbers[Outputs::kTaps], taps[Outputs::kTaps];
  for (int32_t t = 0; t < Outputs::kTaps; ++t) numbers[t] = g.rotated ? Outputs::kTaps - 1 - t : t;

  TileArgs<T> args{};
  args.rows_pitch = Outputs::kMost;
  args.taps = taps;
  args.depth = g.depth;
  args.b_taps = numbers;
  args.b_tap_pitch = packed_depth<T>(g.depth) * lanes;
  args.b = packed;
  args.ahead = args.b;
  args.out_offset = split.first_column(panel);
  args.columns = split.num_columns(panel);
  args.finish = true;
  args.partial = partial;
  args.scale = g.epilogue.scale ? static_cast<const C*>(g.epilogue.scale) + args.out_offset : nullptr;
  args.shift = g.epilogue.shift ? static_cast<const C*>(g.epilogue.shift) + args.out_offset : nullptr;
  args.residual = static_cast<const T*>(g.epilogue.residual);
  args.out_base = g.out;
  args.activation = g.epilogue.activation;
  for (int32_t begin = 0, end; begin < outputs.count; begin = end) {
    for (end = begin + 1; end < outputs.count && outputs.taps[end] == outputs.taps[begin];) ++end;
    args.num_taps = 0;
    for (int32_t t = 0; t < Outputs::kTaps; ++t) {
      if (outputs.taps[begin] >> t & 1) taps[args.num_taps++] = t;
    }
    cut(end - begin, max_rows(vectors), [&](int32_t first, int32_t length) {
      args.rows = outputs.rows + begin + first;
      args.out = outputs.out + begin + first;
      tile_kernel<T>(length, vectors)(args);
    });
  }
}

// One panel of the weights as tile_kernel reads them: [tap][depth][vectors * width]. Some of the depth at a time, and
// all taps of it, which lie side by side in memory.
template <class T>
void pack_panel(const Winograd<T>& g, const T* dense, const Panels<T>& split, int32_t panel, T* to) {
  constexpr int32_t kRun = 8, kTaps = 9, step = kDepthStep<T>;
  const int32_t lanes = split.width(panel) * Panels<T>::kWidth, columns = split.num_columns(panel);
  const int64_t tap_pitch = packed_depth<T>(g.depth) * lanes;
  if (columns < lanes || g.depth % step != 0) std::memset(to, 0, kTaps * tap_pitch * sizeof(T));
  const T* const first = dense + split.first_column(panel) * g.column_pitch;
  for (int32_t begin = 0; begin < g.depth; begin += kRun) {
    const int32_t end = begin + kRun < g.depth ? begin + kRun : g.depth;
    for (int32_t j = 0; j < columns; ++j) {
      for (int32_t l = begin; l < end; ++l) {
        const T* const filter = first + j * g.column_pitch + l * g.depth_pitch;
        T* const element = to + int64_t{l / step} * step * lanes + l % step + j * step;
        for (int32_t tap = 0; tap < kTaps; ++tap) element[tap * tap_pitch] = filter[tap];
      }
    }
  }
}

// All tiles whose flag is set. Returns nullptr, or what went wrong in words.
template <int M, class T>
const char* sum_flagged_tiles(const Winograd<T>& g, const Tiles<M>& grid, const uint8_t* flags,
                              const Parallel& parallel) {
  using Outputs = DirectOutputs<M, T>;
  const int64_t all = grid.count(g.batch);
  int64_t count = 0;
  for (int64_t t = 0; t < all; ++t) count += flags[t];
  if (count == 0) return nullptr;
  // An item is a panel and a run of groups of tiles. The panel is packed for each item, into memory that stays in a
  // cache: to write all of the weights to memory took several times as long as the sums of a few tiles.
  const Panels<T> split(g.columns);
  const int64_t groups = (count + Outputs::kTiles - 1) / Outputs::kTiles;
  const int64_t threads = parallel.threads > 1 ? parallel.threads : 1;
  const int64_t wanted = (threads + split.count - 1) / split.count, runs = wanted < groups ? wanted : groups;
  const int64_t items = split.count * runs, slots = threads < items ? threads : items;
  const int64_t panel_size = Outputs::kTaps * packed_depth<T>(g.depth) * kMaxVectors * Panels<T>::kWidth;
  const RareMemory<int64_t> tiles(count);
  const RareMemory<T> room(int64_t{Outputs::kTaps} * g.depth * g.columns), packed(slots * panel_size);
  if (!tiles.data || !room.data || !packed.data) return kNoMemory;
  for (int64_t t = 0, i = 0; t < all; ++t) {
    if (flags[t]) tiles.data[i++] = t;
  }
  const T* const dense = static_cast<const T*>(g.weights.dense(parallel, room.data));
  parallel.for_each(slots, [&](int64_t slot) {
    T* const weights = packed.data + slot * panel_size;
    for (int64_t item = items * slot / slots; item < items * (slot + 1) / slots; ++item) {
      const int32_t panel = static_cast<int32_t>(item / runs);
      const int64_t run = item % runs;
      pack_panel(g, dense, split, panel, weights);
      for (int64_t group = groups * run / runs; group < groups * (run + 1) / runs; ++group) {
        const int64_t begin = group * Outputs::kTiles;
        Outputs outputs;
        for (int64_t i = begin; i < count && i < begin + Outputs::kTiles; ++i) outputs.add(g, grid.at(tiles.data[i]));
        sum_panel<M>(g, outputs, split, panel, weights);
      }
    }
  });
  return nullptr;
}

}  // namespace
}  // namespace convext::CONVEXT_ISA
