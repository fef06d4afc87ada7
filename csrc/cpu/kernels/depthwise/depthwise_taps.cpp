// Compiled for AVX512-BF16, too.
//
// The kernels behind depthwise_fprop and depthwise_dgrad (depthwise_taps.h has the formula and the classes of outputs).
//
// Here: the classes, the packing of filters, which tile serves a class, and the walk over rows. The tiles themselves:
//
//   depthwise_window.h    filters up to 7 wide, columns one apart, stride 1 or 2: a window of sums in registers
//   depthwise_general.h   everything else
//   depthwise_tile.h      what both know of their place, and the epilogue
#include "depthwise_taps.h"

#include "depthwise_general.h"
#include "depthwise_window.h"

namespace convext {
namespace CONVEXT_ISA {

namespace {

Axis walked(const AxisClasses& classes, int32_t index) { return classes.at(index).ascending(); }

}  // namespace

template <class T>
void pack_taps(const ConvProblem& problem, const void* w, void* packed, const Parallel& parallel) {
  constexpr int64_t width = VecOf<T>::width;
  const int64_t k = problem.k, taps = problem.taps();
  const T* const from = static_cast<const T*>(w);
  parallel.for_each(tap_blocks(k, width), [&](int64_t block) {
    const int64_t begin = tap_block_begin(block, k, width);
    compute_t<T>* const to = static_cast<compute_t<T>*>(packed) + block * taps * width;
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t lane = 0; lane < width; ++lane) {
        to[tap * width + lane] = begin + lane < k ? to_compute(from[(begin + lane) * taps + tap]) : 0;
      }
    }
  });
}

namespace {

// Input and output together: more than a cache keeps for one operation. One thread, third-level cache of 32 MB: reading
// ahead loses 10 to 20 % at 18 and 19 MB and gains 30 to 45 % from 26 MB on.
constexpr double kStreamBytes = 22 << 20;
constexpr int kTileRows = 2, kTileColumns = 7, kNarrowColumns = 4;

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
constexpr Tiles<T> window_tiles() {
  return {kTileColumns,
          kNarrowColumns,
          {{window_tile<T, S, STEP, TH, kTileColumns, false>, window_tile<T, S, STEP, TH, kTileColumns, true>},
           {window_tile<T, S, STEP, TH, kNarrowColumns, false>, window_tile<T, S, STEP, TH, kNarrowColumns, true>}}};
}

template <class T, class Input>
constexpr Tiles<T> general_tiles() {
  return {kGeneralColumns,
          kGeneralColumns,
          {{general_tile<T, Input, false>, general_tile<T, Input, true>},
           {general_tile<T, Input, false>, general_tile<T, Input, true>}}};
}

template <class T>
bool has_window_tile(const TapSum<T>& sum, const Axis& w) {
  if (sum.multiplier != 1 || sum.k < VecOf<T>::width || w.in_tap_step != 1) return false;
  return w.in_step == 1 ? w.taps >= 1 && w.taps <= 7 && w.taps != 6
                        : w.in_step == 2 && (w.taps == 3 || w.taps == 5 || w.taps == 7);
}

// Whether two neighbouring output rows of the class share input rows as the 2-row tile wants it.
template <class T>
bool pairs_rows(const TapSum<T>& sum, const Axis& h, const Axis& w) {
  return has_window_tile(sum, w) && h.in_step == w.in_step * h.in_tap_step && h.taps > w.in_step && w.taps >= 3 &&
         w.taps != 4;
}

template <class T>
Tiles<T> general_tiles_for(const TapSum<T>& sum) {
  if (sum.multiplier > 1) return general_tiles<T, SpreadInput<T>>();
  return sum.k < VecOf<T>::width ? general_tiles<T, PartInput<T>>() : general_tiles<T, WholeInput<T>>();
}

template <class T>
Tiles<T> tiles_for(const TapSum<T>& sum, const Axis& w, bool two_rows) {
  if (has_window_tile(sum, w)) {
    if (w.in_step == 2) {
      if (w.taps == 3) return two_rows ? window_tiles<T, 3, 2, kTileRows>() : window_tiles<T, 3, 2, 1>();
      if (w.taps == 5) return two_rows ? window_tiles<T, 5, 2, kTileRows>() : window_tiles<T, 5, 2, 1>();
      return two_rows ? window_tiles<T, 7, 2, kTileRows>() : window_tiles<T, 7, 2, 1>();
    }
    switch (w.taps) {
      case 1: return window_tiles<T, 1, 1, 1>();
      case 2: return window_tiles<T, 2, 1, 1>();
      case 4: return window_tiles<T, 4, 1, 1>();
      case 3: return two_rows ? window_tiles<T, 3, 1, kTileRows>() : window_tiles<T, 3, 1, 1>();
      case 5: return two_rows ? window_tiles<T, 5, 1, kTileRows>() : window_tiles<T, 5, 1, 1>();
      default: return two_rows ? window_tiles<T, 7, 1, kTileRows>() : window_tiles<T, 7, 1, 1>();
    }
  }
  return general_tiles_for(sum);
}

// ---- rows ----

// Where an output row lies: image, class and index of the plane, class and index of the row.
struct RowPlace {
  int64_t n;
  Axis d, h;
  int32_t l, i;
};

// One or two output rows of a class, all column classes, a range of blocks.
template <class T>
struct RowTask {
  const TapSum<T>& sum;
  const TileEpilogue<T> epilogue;
  const bool streams;

  explicit RowTask(const TapSum<T>& s)
      : sum(s),
        epilogue(s.epilogue),
        streams((double(s.d.in) * s.h.in * s.w.in / s.multiplier + double(s.d.out) * s.h.out * s.w.out) * s.n * s.k *
                    sizeof(T) >
                kStreamBytes) {}

  // Output row `row` of a plane of all images.
  RowPlace place(int64_t plane, int32_t row) const {
    const int32_t l = static_cast<int32_t>(plane % sum.d.out), d_classes = sum.d.count(), h_classes = sum.h.count();
    return {plane / sum.d.out, walked(sum.d, l % d_classes), walked(sum.h, row % h_classes), l / d_classes,
            row / h_classes};
  }

  // Which taps of an output's plane are inside the input: they ascend.
  struct Planes {
    int32_t first, count;
  };
  static Planes inside(const RowPlace& at) {
    int32_t first = 0, end = at.d.taps;
    while (first < end && at.d.input(at.l, first) < 0) ++first;
    while (end > first && at.d.input(at.l, end - 1) >= at.d.in) --end;
    return {first < end ? first : 0, end - first};
  }

  // The part of a tile that the row decides. Strides are in elements; `out_channels` a pixel of the output.
  Tile<T> tile(const RowPlace& at, const Axis& w, int64_t in_channels, int64_t out_channels) const {
    constexpr int64_t width = VecOf<T>::width;
    const Axis &d = at.d, &h = at.h;
    Tile<T> t{epilogue};
    const int64_t taps_w = sum.w.taps, taps_hw = sum.h.taps * taps_w;
    t.in_column = in_channels;
    t.in_row = t.in_column * sum.w.in;
    const Planes planes = inside(at);
    t.in_plane = t.in_row * sum.h.in * d.in_tap_step;
    const int32_t plane = planes.count > 0 ? d.input(at.l, planes.first) : 0;
    t.in = sum.in + (at.n * sum.d.in + plane) * sum.h.in * t.in_row;
    t.w_block = sum.d.taps * taps_hw * width;
    t.packed = sum.packed + (d.tap(planes.first) * taps_hw + h.tap_first * taps_w + w.tap_first) * width;
    t.w_plane = d.tap_step * taps_hw * width;
    t.w_row = int64_t{h.tap_step} * taps_w * width;
    t.w_column = int64_t{w.tap_step} * width;
    t.out_column = int64_t{w.out_step} * out_channels;
    t.out_row = int64_t{h.out_step} * sum.w.out * out_channels;
    t.row = h.in_first + at.i * h.in_step;
    t.rows = h.in;
    t.columns = w.in;
    t.row_step = h.in_step;
    t.column_step = w.in_step;
    t.tap_row_step = h.in_tap_step;
    t.tap_column_step = w.in_tap_step;
    t.taps_d = planes.count;
    t.taps_h = h.taps;
    t.taps_w = w.taps;
    t.k = sum.k;
    t.multiplier = sum.multiplier;
    t.streams = streams;
    return t;
  }

  int64_t out_offset(const RowPlace& at, const Axis& w, int32_t j, int64_t channels) const {
    const int64_t plane = at.n * sum.d.out + at.d.output(at.l), row = at.h.output(at.i), column = w.output(j);
    return ((plane * sum.h.out + row) * sum.w.out + column) * channels;
  }

  // Whether every column that the tile reads for `columns` outputs from j on is inside the image.
  static bool interior(const Axis& w, int32_t j, int32_t columns) {
    const int64_t first = w.in_first + int64_t{j} * w.in_step;
    const int64_t last = first + int64_t{columns - 1} * w.in_step + int64_t{w.taps - 1} * w.in_tap_step;
    return first >= 0 && last < w.in;
  }

  // Reads the input rows that the tiles below will be the first to need into the cache, in the order of memory: the
  // pattern that the CPU recognises and reads ahead of. Prefetching the lines of each tile instead, columns of a row,
  // reaches half the speed at stride 2 (96 channels at 112 x 112, batch 8: 2.1 ms against 1.5).
  static void read_below(const Tile<T>& t, bool two_rows) {
    const int32_t rows = two_rows ? 2 * t.row_step : t.row_step;
    const int32_t next = t.row + (t.taps_h - 1) * t.tap_row_step + rows - t.row_step + 1;
    if (t.taps_d == 0 || next < 0 || next + rows > t.rows) return;
    const T* const from = t.in + (t.taps_d - 1) * t.in_plane + next * t.in_row;  // other planes have been read before
    for (int64_t i = 0; i < rows * t.in_row; i += 64 / sizeof(T)) {
      asm volatile("" : : "r"(*reinterpret_cast<const char*>(from + i)));
    }
  }

  void run(const RowPlace& at, bool two_rows, int32_t block_begin, int32_t block_end) const {
    for (int32_t index = 0; index < sum.w.count(); ++index) {
      const Axis w = walked(sum.w, index);
      Tile<T> t = tile(at, w, sum.k / sum.multiplier, sum.k);
      // In dgrad with a stride above the filter's extent there are outputs that no tap reaches: the epilogue of zero.
      const bool reached = at.d.taps > 0 && at.h.taps > 0 && w.taps > 0;
      const Tiles<T> tiles = reached ? tiles_for(sum, w, two_rows) : general_tiles_for(sum);
      if (!reached) t.taps_d = 0;
      t.block_begin = block_begin;
      t.block_end = block_end;
      if (streams && reached && index == 0 && block_begin == 0) read_below(t, two_rows);
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
        const int64_t offset = out_offset(at, w, j, sum.k);
        t.out = sum.out + offset;
        t.residual = epilogue.residual ? epilogue.residual + offset : nullptr;
        tiles.run[narrow][edge](t);
        j += t.tiles * columns;
      }
    }
  }
};

constexpr double kSerialFlops = 2e5;  // below, threads cost more than they bring

template <class T>
Parallel threads_for(const TapSum<T>& sum, const Parallel& parallel) {
  const double outputs = double(sum.n) * sum.d.out * sum.h.out * sum.w.out * sum.k;
  const double taps = double(sum.d.taps) * sum.h.taps * sum.w.taps / sum.d.count() / sum.h.count() / sum.w.count();
  return {parallel.run, outputs * taps * 2 < kSerialFlops ? 1 : parallel.threads};
}

}  // namespace

template <class T>
void sum_taps(const TapSum<T>& sum, const Parallel& all_threads) {
  const Parallel parallel = threads_for(sum, all_threads);
  const RowTask<T> rows(sum);
  // Rows are taken in pairs where there is one class of them and the tile can.
  const bool pairs = sum.h.count() == 1 && sum.w.count() == 1 && pairs_rows(sum, walked(sum.h, 0), walked(sum.w, 0));
  const int64_t row_tasks = pairs ? (sum.h.out + 1) / 2 : sum.h.out;
  // Channels are split where rows are few; never below two blocks, since the last one overlaps its neighbour.
  const int64_t blocks = tap_blocks(sum.k, VecOf<T>::width);
  const int64_t planes = int64_t{sum.n} * sum.d.out, tasks = planes * row_tasks;
  if (tasks == 0) return;
  int64_t splits = parallel.threads <= 1 ? 1 : (4 * parallel.threads + tasks - 1) / tasks;
  if (splits > blocks / 2) splits = blocks / 2;
  if (splits < 1) splits = 1;
  // A split's rows one after the other: threads that cut a matrix product by channels then read what they have written.
  parallel.for_each(tasks * splits, [&](int64_t item) {
    const int64_t split = item / tasks, task = item % tasks;
    const int32_t begin = static_cast<int32_t>(split * blocks / splits);
    const int32_t end = static_cast<int32_t>((split + 1) * blocks / splits);
    const int32_t row = static_cast<int32_t>(task % row_tasks);
    if (!pairs) return rows.run(rows.place(task / row_tasks, row), false, begin, end);
    const RowPlace at = rows.place(task / row_tasks, 2 * row);
    const bool both = 2 * row + 1 < sum.h.out, reached = at.d.taps > 0;  // a plane that no tap reaches has no pairs
    rows.run(at, both && reached, begin, end);
    if (both && !reached) rows.run(rows.place(task / row_tasks, 2 * row + 1), false, begin, end);
  });
}

namespace {

// sum * scale + shift + residual of the channels from c on, which lie from element `at` of the output on.
template <class T>
VecOf<T> biased(const TileEpilogue<T>& e, VecOf<T> sum, int64_t c, int64_t at, int64_t count) {
  const Lanes<compute_t<T>> lanes(count);
  if (e.scale) sum = sum * load(e.scale + c, lanes);
  if (e.shift) sum = sum + load(e.shift + c, lanes);
  return e.residual ? sum + load_as(e.residual + at, count) : sum;
}

}  // namespace

template <class T>
void sum_taps_and_filters(const TapSum<T>& sum, const Parallel& all_threads) {
  constexpr int64_t width = VecOf<T>::width, kChannels = 64;  // whole blocks of filters for any multiplier
  const Parallel parallel = threads_for(sum, all_threads);
  const RowTask<T> rows(sum);
  const int64_t m = sum.multiplier, channels = sum.k / m;
  parallel.for_each(int64_t{sum.n} * sum.d.out * sum.h.out, [&](int64_t task) {
    const RowPlace at = rows.place(task / sum.h.out, static_cast<int32_t>(task % sum.h.out));
    for (int32_t index = 0; index < sum.w.count(); ++index) {
      const Axis w = walked(sum.w, index);
      Tile<T> t = rows.tile(at, w, sum.k, channels);
      for (int32_t j = 0; j < w.count; j += kGeneralColumns) {
        t.valid = w.count - j < kGeneralColumns ? w.count - j : kGeneralColumns;
        t.column = w.in_first + j * w.in_step;
        const int64_t offset = rows.out_offset(at, w, j, channels);
        for (int64_t c = 0; c < channels; c += kChannels) {
          const int64_t count = channels - c < kChannels ? channels - c : kChannels;
          compute_t<T> totals[kGeneralColumns][kChannels] = {};
          for (int64_t block = c * m / width; block * width < (c + count) * m && w.taps > 0; ++block) {
            const int64_t k = tap_block_begin(block, sum.k, width);
            VecOf<T> sums[1][kGeneralColumns];
            const compute_t<T>* const taps = t.packed + block * t.w_block;
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
          visit_activation<VecOf<T>>(rows.epilogue.activation, [&](auto act) {
            for (int32_t x = 0; x < t.valid; ++x) {
              for (int64_t l = 0; l < count; l += width) {
                const int64_t to = offset + x * t.out_column + c + l;
                store_as(sum.out + to, act.forward(biased(rows.epilogue, load(totals[x] + l), c + l, to, count - l)),
                         count - l);
              }
            }
          });
        }
      }
    }
  });
}

#define CONVEXT_INSTANTIATE(T, name)                                                   \
  template void pack_taps<T>(const ConvProblem&, const void*, void*, const Parallel&); \
  template void sum_taps<T>(const TapSum<T>&, const Parallel&);                        \
  template void sum_taps_and_filters<T>(const TapSum<T>&, const Parallel&);
CONVEXT_FOR_ELEMENTS(CONVEXT_INSTANTIATE)
#undef CONVEXT_INSTANTIATE

}  // namespace CONVEXT_ISA
}  // namespace convext
