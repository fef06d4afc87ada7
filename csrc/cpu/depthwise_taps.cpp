// The kernels behind depthwise_fprop and depthwise_dgrad (depthwise_taps.h has the formula and the classes of outputs).
//
// Tile: 2 rows x 7 columns of outputs x W channels (1 x 7 where rows share no input row, 4 columns for remainders),
// channels innermost over all blocks, so that memory is walked in its own order:
//
//            j ->                              input rows   filter rows that use them
//   i   [ o o o o o o o ]                          0           a0
//       [ o o o o o o o ]                          1           a1, b0        a: upper output row, b: lower
//   each o: W channels in one register             2           a2, b1
//                                                  3               b2
//
// An input vector is loaded once for both rows and all taps: 4 * 9 loads for 2 * 7 * 9 FMAs in the 3 x 3 case.
// Registers at S taps a row: 14 sums + 2 S taps + 1 input = 21 (3 x 3), 25 (5 x 5), 29 (7 x 7) of 32; with 16 registers
// the taps are memory operands. Columns and rows in the padding are skipped, not multiplied by zero.
//
// Anything else (dilated columns, filters wider than 7, stride above 2, fewer channels than W, a channel multiplier)
// takes the general tile: 1 x 8 outputs x W channels, taps at run time, one load for each FMA.
//
// Tried and lost, 3 x 3 with batch norm and ReLU6, 144 channels at 56 x 56, batch 1, one thread (74 us):
//   - groups of channels whose window of input rows stays in L1: 92 us;
//   - prefetching the next tile's input: 79 us; its outputs too: 90 us.
// Prefetching the rows below pays where operands stream from memory, and there alone: batch 8, 32 channels at 112 x 112
// from 2300 to 700 us.
#include "depthwise_taps.h"

#include "depthwise_input.h"

namespace convext {
namespace CONVEXT_ISA {

TapAxis TapClasses::at(int32_t index) const {
  if (!transposed) return {out_size, 0, 1, -pad, stride, in_size, taps, taps == 1 ? 1 : dil, 0, 1};
  // Output h = index + i * stride meets tap r where h + pad - r * dil is a multiple of the stride: r = r0, r0 + g, ...
  // with g = stride / gcd(stride, dil); then p = (h + pad - r * dil) / stride. Taps are walked backwards, p upwards.
  int32_t a = stride, b = dil;
  while (b) {
    const int32_t rest = a % b;
    a = b;
    b = rest;
  }
  const int32_t g = stride / a;
  int32_t r0 = 0;
  while (r0 < g && (index + pad - int64_t{r0} * dil) % stride != 0) ++r0;
  const int32_t count = (out_size - index + stride - 1) / stride;
  const int32_t met = r0 < g && r0 < taps ? (taps - 1 - r0) / g + 1 : 0;
  if (met == 0) return {count, index, stride, 0, 1, in_size, 0, 1, 0, 1};
  const int32_t tap_step = met == 1 ? 1 : g * dil / stride;
  const int64_t nearest = (index + pad - int64_t{r0} * dil) / stride;
  return {count, index,   stride,   static_cast<int32_t>(nearest - int64_t{met - 1} * tap_step), 1, in_size,
          met,   tap_step, r0 + (met - 1) * g, -g};
}

template <class T>
void pack_taps(const ConvProblem& problem, const void* w, void* packed, const Parallel& parallel) {
  constexpr int64_t width = Vec<T>::width;
  const int64_t k = problem.k, taps = int64_t{problem.r} * problem.s;
  const T* const from = static_cast<const T*>(w);
  parallel.for_each(tap_blocks(k, width), [&](int64_t block) {
    const int64_t begin = tap_block_begin(block, k, width);
    T* const to = static_cast<T*>(packed) + block * taps * width;
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t lane = 0; lane < width; ++lane) {
        to[tap * width + lane] = begin + lane < k ? from[(begin + lane) * taps + tap] : T(0);
      }
    }
  });
}

namespace {

constexpr double kStreamBytes = 16 << 20;  // input and output together: more than a cache keeps for one operation
constexpr int kTileRows = 2, kTileColumns = 7, kNarrowColumns = 4, kGeneralColumns = 8;

// ---- the epilogue of a tile ----

template <class T>
struct TileEpilogue {
  const T *scale, *shift, *residual;  // residual points at the tile's first output
  bool clamps;                        // the activation is min(max(z, low), high)
  T low, high;
  Activation activation;

  explicit TileEpilogue(const Epilogue& e)
      : scale(static_cast<const T*>(e.scale)),
        shift(static_cast<const T*>(e.shift)),
        residual(static_cast<const T*>(e.residual)),
        clamps(e.activation == Activation::identity || e.activation == Activation::relu ||
               e.activation == Activation::relu6),
        low(e.activation == Activation::identity ? -__builtin_huge_val() : T(0)),
        high(e.activation == Activation::relu6 ? T(6) : __builtin_huge_val()),
        activation(e.activation) {}
};

// The activations that do not clamp, on one vector in memory.
template <class T>
__attribute__((noinline)) Vec<T> activate(Activation which, Vec<T> z) {
  return visit_activation<Vec<T>>(which, [&](auto act) { return act.forward(z); });
}

// Everything a tile needs to know: the first output's place and the steps between neighbours, in elements.
template <class T>
struct Tile {
  TileEpilogue<T> epilogue;
  const T* in;         // image n, channel 0
  const T* packed;     // tap (w_first, w_first) of block 0
  T* out;              // first output of the tile, channel 0
  const T* residual;   // as out, or nullptr
  int64_t in_row, in_column, out_row, out_column;
  int64_t w_row, w_column, w_block;
  int32_t row, column, rows, columns;   // first input row and column (may be negative), and the input's extents
  int32_t row_step, column_step;        // between outputs
  int32_t tap_row_step, tap_column_step;
  int32_t taps_h, taps_w;
  int32_t valid;                        // columns of the tile that exist
  int32_t tiles;                        // that many side by side
  bool streams;                         // input and output come from memory, not from a cache
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

// epilogue(sums) to memory. Lanes is absent where all W channels exist.
template <int TH, int TW, bool EDGE, class T, class... MaybeLanes>
CONVEXT_INLINE void finish(const Tile<T>& t, int64_t k, Vec<T> (&sums)[TH][TW], MaybeLanes... lanes) {
  const TileEpilogue<T>& e = t.epilogue;
  const Vec<T> scale = e.scale ? load(e.scale + k, lanes...) : Vec<T>(T(1));
  const Vec<T> shift = e.shift ? load(e.shift + k, lanes...) : Vec<T>::zero();
  auto each = [&](auto&& out_of) __attribute__((always_inline)) {
    CONVEXT_UNROLL
    for (int i = 0; i < TH; ++i) {
      CONVEXT_UNROLL
      for (int j = 0; j < TW; ++j) {
        if (EDGE && j >= t.valid) continue;
        const int64_t at = i * t.out_row + j * t.out_column + k;
        store(t.out + at, out_of(at, fma(shift, sums[i][j], scale)), lanes...);
      }
    }
  };
  if (e.clamps && !t.residual) {
    const Vec<T> low(e.low), high(e.high);
    each([&](int64_t, Vec<T> z) __attribute__((always_inline)) {
      return min_keep_nan(max_keep_nan(z, low), high);
    });
  } else {
    each([&](int64_t at, Vec<T> z) __attribute__((always_inline)) {
      return activate(e.activation, t.residual ? z + load(t.residual + at, lanes...) : z);
    });
  }
}

// ---- the tile of small filters: S taps a row one column apart, STEP columns between outputs ----

// One input row: filter row `a` for the upper outputs, `b` for the lower ones; either may be absent.
template <int S, int STEP, int TH, int TW, bool EDGE, bool UPPER, bool LOWER, class T>
CONVEXT_INLINE void add_row(const Tile<T>& t, const T* in, const T* a, const T* b, Vec<T> (&sums)[TH][TW]) {
  constexpr int kColumns = (TW - 1) * STEP + S;
  Vec<T> upper[S], lower[S];
  CONVEXT_UNROLL
  for (int s = 0; s < S; ++s) {
    if (UPPER) upper[s] = load(a + s * t.w_column);
    if (LOWER) lower[s] = load(b + s * t.w_column);
  }
  CONVEXT_UNROLL
  for (int column = 0; column < kColumns; ++column) {
    if (EDGE && !t.column_inside(t.column + column)) continue;
    const Vec<T> x = load(in + (t.column + column) * t.in_column);
    CONVEXT_UNROLL
    for (int s = 0; s < S; ++s) {
      const int j = (column - s) / STEP;
      if (column < s || (column - s) % STEP != 0 || j >= TW) continue;
      if (UPPER) sums[0][j] = fma(sums[0][j], x, upper[s]);
      if (LOWER) sums[TH - 1][j] = fma(sums[TH - 1][j], x, lower[s]);
    }
  }
}

// Asks for the input rows that the tile below will be the first to read, and for its outputs, in this tile's columns.
template <int STEP, int TH, int TW, class T>
CONVEXT_INLINE void prefetch_below(const Tile<T>& t, int64_t k) {
  const int32_t next = t.row + (t.taps_h - 1) * t.tap_row_step + (TH - 1) * t.row_step + 1;
  for (int32_t h = next; h < next + TH * t.row_step; ++h) {
    if (!t.row_inside(h)) continue;
    const T* const row = t.in + h * t.in_row + t.column * t.in_column + k;
    CONVEXT_UNROLL
    for (int j = 0; j < TW * STEP; ++j) __builtin_prefetch(row + j * t.in_column, 0);
  }
  for (int i = TH; i < 2 * TH; ++i) {
    CONVEXT_UNROLL
    for (int j = 0; j < TW; ++j) __builtin_prefetch(t.out + i * t.out_row + j * t.out_column + k, 1);
  }
}

template <class T, int S, int STEP, int TH, int TW, bool EDGE>
CONVEXT_INLINE void small_block(const Tile<T>& t, int64_t block) {
  const int64_t k = tap_block_begin(block, t.k, Vec<T>::width);
  const T* const w = t.packed + block * t.w_block;
  const T* const in = t.in + k;
  if (t.streams) prefetch_below<STEP, TH, TW>(t, k);
  Vec<T> sums[TH][TW];
  CONVEXT_UNROLL
  for (int i = 0; i < TH; ++i) {
    CONVEXT_UNROLL
    for (int j = 0; j < TW; ++j) sums[i][j] = Vec<T>::zero();
  }
  if constexpr (TH == 1) {
    for (int32_t r = 0; r < t.taps_h; ++r) {
      const int32_t h = t.row + r * t.tap_row_step;
      if (!t.row_inside(h)) continue;
      add_row<S, STEP, TH, TW, EDGE, true, false>(t, in + h * t.in_row, w + r * t.w_row, w, sums);
    }
  } else {
    // Input row r meets filter row r in the upper outputs and r - 1 in the lower ones.
    if (t.row_inside(t.row)) {
      add_row<S, STEP, TH, TW, EDGE, true, false>(t, in + t.row * t.in_row, w, w, sums);
    }
    for (int32_t r = 1; r < t.taps_h; ++r) {
      const int32_t h = t.row + r * t.tap_row_step;
      if (!t.row_inside(h)) continue;
      const T* const a = w + r * t.w_row;
      add_row<S, STEP, TH, TW, EDGE, true, true>(t, in + h * t.in_row, a, a - t.w_row, sums);
    }
    const int32_t last = t.row + t.taps_h * t.tap_row_step;
    if (t.row_inside(last)) {
      add_row<S, STEP, TH, TW, EDGE, false, true>(t, in + last * t.in_row, w, w + (t.taps_h - 1) * t.w_row, sums);
    }
  }
  finish<TH, TW, EDGE>(t, k, sums);
}

template <class T, int S, int STEP, int TH, int TW, bool EDGE>
void small_tile(const Tile<T>& first) {
  Tile<T> t = first;  // a copy that no store can alias
  for (int32_t i = 0; i < t.tiles; ++i, t.advance(TW)) {
    for (int64_t block = t.block_begin; block < t.block_end; ++block) small_block<T, S, STEP, TH, TW, EDGE>(t, block);
  }
}

// ---- the general tile ----

template <bool EDGE, class Input, class T>
CONVEXT_INLINE void general_sums(const Tile<T>& t, const Input& input, int64_t k, const T* w,
                                 Vec<T> (&sums)[1][kGeneralColumns]) {
  CONVEXT_UNROLL
  for (int j = 0; j < kGeneralColumns; ++j) sums[0][j] = Vec<T>::zero();
  for (int32_t r = 0; r < t.taps_h; ++r) {
    const int32_t h = t.row + r * t.tap_row_step;
    if (!t.row_inside(h)) continue;
    const T* const in = t.in + h * t.in_row + k;
    for (int32_t s = 0; s < t.taps_w; ++s) {
      const Vec<T> tap = load(w + r * t.w_row + s * t.w_column);
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

template <class T, class Input, bool EDGE>
CONVEXT_INLINE void general_block(const Tile<T>& t, int64_t block) {
  const int64_t k = tap_block_begin(block, t.k, Vec<T>::width);
  const Input input(k, t.k, t.multiplier);
  Vec<T> sums[1][kGeneralColumns];
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

// ---- which tile ----

template <class T>
using TileFunction = void (*)(const Tile<T>&);

// The tiles for one class of columns: [wide or narrow][at the border or not].
template <class T>
struct Tiles {
  int32_t wide, narrow;
  TileFunction<T> run[2][2];
};

template <class T, int S, int STEP, int TH>
constexpr Tiles<T> small_tiles() {
  return {kTileColumns,
          kNarrowColumns,
          {{small_tile<T, S, STEP, TH, kTileColumns, false>, small_tile<T, S, STEP, TH, kTileColumns, true>},
           {small_tile<T, S, STEP, TH, kNarrowColumns, false>, small_tile<T, S, STEP, TH, kNarrowColumns, true>}}};
}

template <class T, class Input>
constexpr Tiles<T> general_tiles() {
  return {kGeneralColumns,
          kGeneralColumns,
          {{general_tile<T, Input, false>, general_tile<T, Input, true>},
           {general_tile<T, Input, false>, general_tile<T, Input, true>}}};
}

template <class T>
bool has_small_tile(const TapSum<T>& sum, const TapAxis& w) {
  if (sum.multiplier != 1 || sum.k < Vec<T>::width || w.tap_step != 1) return false;
  return w.in_step == 1 ? w.taps >= 1 && w.taps <= 7 && w.taps != 6
                        : w.in_step == 2 && (w.taps == 3 || w.taps == 5 || w.taps == 7);
}

// Whether two neighbouring output rows of the class share input rows as the 2-row tile wants it.
template <class T>
bool pairs_rows(const TapSum<T>& sum, const TapAxis& h, const TapAxis& w) {
  return has_small_tile(sum, w) && h.in_step == h.tap_step && h.taps > 1 && w.in_step == 1 && w.taps >= 3 &&
         w.taps != 4;
}

template <class T>
Tiles<T> tiles_for(const TapSum<T>& sum, const TapAxis& w, bool two_rows) {
  if (has_small_tile(sum, w)) {
    if (w.in_step == 2) {
      if (w.taps == 3) return small_tiles<T, 3, 2, 1>();
      return w.taps == 5 ? small_tiles<T, 5, 2, 1>() : small_tiles<T, 7, 2, 1>();
    }
    switch (w.taps) {
      case 1: return small_tiles<T, 1, 1, 1>();
      case 2: return small_tiles<T, 2, 1, 1>();
      case 4: return small_tiles<T, 4, 1, 1>();
      case 3: return two_rows ? small_tiles<T, 3, 1, kTileRows>() : small_tiles<T, 3, 1, 1>();
      case 5: return two_rows ? small_tiles<T, 5, 1, kTileRows>() : small_tiles<T, 5, 1, 1>();
      default: return two_rows ? small_tiles<T, 7, 1, kTileRows>() : small_tiles<T, 7, 1, 1>();
    }
  }
  if (sum.multiplier > 1) return general_tiles<T, SpreadInput<T>>();
  return sum.k < Vec<T>::width ? general_tiles<T, PartInput<T>>() : general_tiles<T, WholeInput<T>>();
}

// ---- rows ----

// One or two output rows of a class, all column classes, a range of blocks.
template <class T>
struct RowTask {
  const TapSum<T>& sum;
  const TileEpilogue<T> epilogue;
  const bool streams;

  explicit RowTask(const TapSum<T>& s)
      : sum(s),
        epilogue(s.epilogue),
        streams((double(s.h.in_size) * s.w.in_size / s.multiplier + double(s.h.out_size) * s.w.out_size) * s.n * s.k *
                    sizeof(T) > kStreamBytes) {}

  // The part of a tile that the row decides. Strides are in elements; `out_channels` a pixel of the output.
  Tile<T> tile(const TapAxis& h, const TapAxis& w, int64_t n, int32_t i, int64_t in_channels,
               int64_t out_channels) const {
    constexpr int64_t width = Vec<T>::width;
    Tile<T> t{epilogue};
    const int64_t taps_w = sum.w.taps;
    t.in_column = in_channels;
    t.in_row = t.in_column * sum.w.in_size;
    t.in = sum.in + n * sum.h.in_size * t.in_row;
    t.w_block = int64_t{sum.h.taps} * taps_w * width;
    t.packed = sum.packed + (int64_t{h.w_first} * taps_w + w.w_first) * width;
    t.w_row = int64_t{h.w_step} * taps_w * width;
    t.w_column = int64_t{w.w_step} * width;
    t.out_column = int64_t{w.step} * out_channels;
    t.out_row = int64_t{h.step} * sum.w.out_size * out_channels;
    t.row = h.in_first + i * h.in_step;
    t.rows = h.in_size;
    t.columns = w.in_size;
    t.row_step = h.in_step;
    t.column_step = w.in_step;
    t.tap_row_step = h.tap_step;
    t.tap_column_step = w.tap_step;
    t.taps_h = h.taps;
    t.taps_w = w.taps;
    t.k = sum.k;
    t.multiplier = sum.multiplier;
    t.streams = streams;
    return t;
  }

  int64_t out_offset(const TapAxis& h, const TapAxis& w, int64_t n, int32_t i, int32_t j, int64_t channels) const {
    const int64_t row = h.first + int64_t{i} * h.step, column = w.first + int64_t{j} * w.step;
    return ((n * sum.h.out_size + row) * sum.w.out_size + column) * channels;
  }

  // Whether every column that the tile reads for `columns` outputs from j on is inside the image.
  static bool interior(const TapAxis& w, int32_t j, int32_t columns) {
    const int64_t first = w.in_first + int64_t{j} * w.in_step;
    const int64_t last = first + int64_t{columns - 1} * w.in_step + int64_t{w.taps - 1} * w.tap_step;
    return first >= 0 && last < w.in_size;
  }

  void run(int64_t n, const TapAxis& h, int32_t i, bool two_rows, int32_t block_begin, int32_t block_end) const {
    for (int32_t index = 0; index < sum.w.count(); ++index) {
      const TapAxis w = sum.w.at(index);
      if (w.taps == 0 || h.taps == 0) {
        clear(n, h, w, i, block_begin, block_end);
        continue;
      }
      const Tiles<T> tiles = tiles_for(sum, w, two_rows);
      Tile<T> t = tile(h, w, n, i, sum.k / sum.multiplier, sum.k);
      t.block_begin = block_begin;
      t.block_end = block_end;
      for (int32_t j = 0; j < w.count;) {
        const int32_t left = w.count - j;
        const bool narrow = left <= tiles.narrow || left == 2 * tiles.narrow;
        const int32_t columns = narrow ? tiles.narrow : tiles.wide;
        t.valid = left < columns ? left : columns;
        const bool edge = t.valid < columns || !interior(w, j, columns);
        t.tiles = 1;
        while (!edge && !narrow && (t.tiles + 1) * columns <= left && interior(w, j + t.tiles * columns, columns)) {
          ++t.tiles;
        }
        t.column = w.in_first + j * w.in_step;
        const int64_t at = out_offset(h, w, n, i, j, sum.k);
        t.out = sum.out + at;
        t.residual = epilogue.residual ? epilogue.residual + at : nullptr;
        tiles.run[narrow][edge](t);
        j += t.tiles * columns;
      }
    }
  }

  // Outputs that no tap reaches, in dgrad with a stride above the filter's extent. There is no epilogue in dgrad.
  void clear(int64_t n, const TapAxis& h, const TapAxis& w, int32_t i, int32_t block_begin, int32_t block_end) const {
    constexpr int64_t width = Vec<T>::width;
    const int64_t begin = tap_block_begin(block_begin, sum.k, width);
    const int64_t last = tap_block_begin(block_end - 1, sum.k, width) + width, end = last < sum.k ? last : sum.k;
    for (int32_t j = 0; j < w.count; ++j) {
      T* const out = sum.out + out_offset(h, w, n, i, j, sum.k);
      for (int64_t k = begin; k < end; ++k) out[k] = T(0);
    }
  }
};

constexpr double kSerialFlops = 2e5;  // below, threads cost more than they bring

template <class T>
Parallel threads_for(const TapSum<T>& sum, const Parallel& parallel) {
  const double outputs = double(sum.n) * sum.h.out_size * sum.w.out_size * sum.k;
  const double taps = double(sum.h.taps) * sum.w.taps / sum.h.count() / sum.w.count();
  return {parallel.run, outputs * taps * 2 < kSerialFlops ? 1 : parallel.threads};
}

}  // namespace

template <class T>
void sum_taps(const TapSum<T>& sum, const Parallel& all_threads) {
  const Parallel parallel = threads_for(sum, all_threads);
  const RowTask<T> rows(sum);
  // Rows are taken in pairs where there is one class of them and the tile can.
  const bool pairs = sum.h.count() == 1 && sum.w.count() == 1 && pairs_rows(sum, sum.h.at(0), sum.w.at(0));
  const int64_t row_tasks = pairs ? (sum.h.out_size + 1) / 2 : sum.h.out_size;
  // Channels are split where rows are few; never below two blocks, since the last one overlaps its neighbour.
  const int64_t blocks = tap_blocks(sum.k, Vec<T>::width), tasks = sum.n * row_tasks;
  if (tasks == 0) return;
  int64_t splits = parallel.threads <= 1 ? 1 : (4 * parallel.threads + tasks - 1) / tasks;
  if (splits > blocks / 2) splits = blocks / 2;
  if (splits < 1) splits = 1;
  parallel.for_each(tasks * splits, [&](int64_t task) {
    const int32_t begin = static_cast<int32_t>(task % splits * blocks / splits);
    const int32_t end = static_cast<int32_t>((task % splits + 1) * blocks / splits);
    const int64_t n = task / splits / row_tasks;
    const int32_t row = static_cast<int32_t>(task / splits % row_tasks);
    const int32_t stride = sum.h.count();
    const TapAxis h = sum.h.at(row % stride);
    if (!pairs) return rows.run(n, h, row / stride, false, begin, end);
    rows.run(n, h, 2 * row, 2 * row + 1 < sum.h.out_size, begin, end);
  });
}

template <class T>
void sum_taps_and_filters(const TapSum<T>& sum, const Parallel& all_threads) {
  constexpr int64_t width = Vec<T>::width, kChannels = 64;  // whole blocks of filters for any multiplier
  const Parallel parallel = threads_for(sum, all_threads);
  const RowTask<T> rows(sum);
  const int64_t m = sum.multiplier, channels = sum.k / m;
  parallel.for_each(int64_t{sum.n} * sum.h.out_size, [&](int64_t task) {
    const int64_t n = task / sum.h.out_size;
    const int32_t row = static_cast<int32_t>(task % sum.h.out_size), i = row / sum.h.count();
    const TapAxis h = sum.h.at(row % sum.h.count());
    for (int32_t index = 0; index < sum.w.count(); ++index) {
      const TapAxis w = sum.w.at(index);
      Tile<T> t = rows.tile(h, w, n, i, sum.k, channels);
      for (int32_t j = 0; j < w.count; j += kGeneralColumns) {
        t.valid = w.count - j < kGeneralColumns ? w.count - j : kGeneralColumns;
        t.column = w.in_first + j * w.in_step;
        T* const out = sum.out + rows.out_offset(h, w, n, i, j, channels);
        for (int64_t c = 0; c < channels; c += kChannels) {
          const int64_t count = channels - c < kChannels ? channels - c : kChannels;
          T totals[kGeneralColumns][kChannels] = {};
          for (int64_t block = c * m / width; block * width < (c + count) * m && w.taps > 0; ++block) {
            const int64_t k = tap_block_begin(block, sum.k, width);
            Vec<T> sums[1][kGeneralColumns];
            const T* const taps = t.packed + block * t.w_block;
            if (sum.k < width) {
              general_sums<true>(t, PartInput<T>(k, t.k, 1), k, taps, sums);
            } else {
              general_sums<true>(t, WholeInput<T>(k, t.k, 1), k, taps, sums);
            }
            // Lanes that the block before has had already, or that lie past the last filter, are left out.
            for (int64_t lane = block * width - k; lane < width && k + lane < (c + count) * m; ++lane) {
              for (int x = 0; x < kGeneralColumns; ++x) totals[x][(k + lane) / m - c] += sums[0][x].v[lane];
            }
          }
          for (int32_t x = 0; x < t.valid; ++x) {
            for (int64_t l = 0; l < count; ++l) out[x * t.out_column + c + l] = totals[x][l];
          }
        }
      }
    }
  });
}

template void pack_taps<float>(const ConvProblem&, const void*, void*, const Parallel&);
template void pack_taps<double>(const ConvProblem&, const void*, void*, const Parallel&);
template void sum_taps<float>(const TapSum<float>&, const Parallel&);
template void sum_taps<double>(const TapSum<double>&, const Parallel&);
template void sum_taps_and_filters<float>(const TapSum<float>&, const Parallel&);
template void sum_taps_and_filters<double>(const TapSum<double>&, const Parallel&);

}  // namespace CONVEXT_ISA
}  // namespace convext
