// Compiled for AVX512-BF16, too.
#include "implicit_gemm.h"

namespace convext::CONVEXT_ISA {
namespace {

// Part of B that all tiles of a block read before the next one, and part of A (a block's pixels): both should stay in
// the second-level cache. A part as small as the first-level cache is no faster: what a tile reads of B comes in order,
// and the more parts, the more often sums go to the output and back.
constexpr int64_t kPartBytes = 128 << 10;
constexpr int64_t kBlockBytes = 512 << 10;
// B that stays in the second-level cache of a core beside a block of A.
constexpr int64_t kKeptBytes = 768 << 10;
// Items of work to aim for, so that any sensible number of threads finds something to do. What is computed does not
// depend on how the grid is cut.
constexpr int32_t kItems = 32;
// Pixels of a block, and pointers in its table: 32 KiB on the stack.
constexpr int32_t kMinPixels = 48, kMaxPixels = 192;
constexpr int32_t kTablePointers = 4096;

template <class I>
constexpr I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}
template <class I>
constexpr I at_least(I a, I b) {
  return a > b ? a : b;
}
template <class I>
constexpr I at_most(I a, I b) {
  return a < b ? a : b;
}

template <class T>
constexpr int32_t grid_taps(const ImplicitGemm<T>& g) {
  return g.planes.taps * g.height.taps * g.width.taps;
}

// How the grid is cut: blocks of pixels as even as they go, runs of panels as even as they go.
template <class T>
struct Partition {
  int64_t pixels;  // of the grid
  int64_t blocks;  // of pixels
  int32_t panels;  // of all groups
  int32_t panel_runs;

  Partition(const ImplicitGemm<T>& g, const Panels<T>& split, int32_t items) {
    pixels = int64_t{g.batch} * g.planes.count * g.height.count * g.width.count;
    const int64_t in_cache = kBlockBytes / (sizeof(T) * at_least<int64_t>(1, int64_t{g.depth} * g.groups));
    // Few enough for the pointers of all taps to fit into the table.
    const int64_t in_table = kTablePointers / at_least(1, grid_taps(g));
    const int64_t size =
        at_least<int64_t>(kMinPixels, at_most(at_most(at_most<int64_t>(kMaxPixels, in_cache), in_table),
                                              ceil_div<int64_t>(pixels, at_least(1, items / 2))));
    blocks = ceil_div(pixels, size);
    panels = g.groups * split.count;
    panel_runs = static_cast<int32_t>(at_most<int64_t>(panels, ceil_div<int64_t>(items, blocks)));
  }
  int64_t block_begin(int64_t block) const { return pixels * block / blocks; }
  int32_t run_begin(int64_t run) const { return static_cast<int32_t>(int64_t{panels} * run / panel_runs); }
};

// Where A is read and C written for one block of pixels and one run of taps.
template <class T>
struct Table {
  const T* rows[kTablePointers];   // (taps, pixels)
  int32_t b_taps[kTablePointers];  // number of the tap in the packed weights
  T* out[kMaxPixels];
  int32_t row_end[kMaxPixels];  // first pixel of the block that is on a later row of the grid
  int32_t first_tap = -1, pixels, taps;
  bool padded;  // some pointer is the row of zeros

  // Pixels [begin, begin + pixels), taps [first_tap, first_tap + taps) of the grid.
  void fill(const ImplicitGemm<T>& g, int64_t begin, int32_t num_pixels, int32_t from_tap, int32_t num_taps) {
    first_tap = from_tap, pixels = num_pixels, taps = num_taps, padded = false;
    for_taps(g, [&](int32_t at, int32_t t, int32_t r, int32_t s) {
      b_taps[at] = (g.planes.tap(t) * g.filter_height + g.height.tap(r)) * g.filter_width + g.width.tap(s);
    });
    int64_t m = begin;
    for (int32_t p = 0; p < pixels;) {  // one row of the grid, or what the block has of it
      const int64_t row = m / g.width.count, plane = row / g.height.count;
      const Place at{plane / g.planes.count, static_cast<int32_t>(plane % g.planes.count),
                     static_cast<int32_t>(row % g.height.count), static_cast<int32_t>(m % g.width.count)};
      const int32_t length = at_most(g.width.count - at.q, pixels - p);
      fill_out(g, p, length, at);
      for_taps(g, [&](int32_t tap, int32_t t, int32_t r, int32_t s) {
        fill_row(g, rows + int64_t{tap} * pixels + p, length, at, t, r, s);
      });
      p += length, m += length;
    }
  }

 private:
  // A pixel of the grid.
  struct Place {
    int64_t n;
    int32_t z, p, q;
  };

  // visit(i, t, r, s) for tap i of the table, which is tap (t, r, s) of the grid.
  template <class F>
  void for_taps(const ImplicitGemm<T>& g, F&& visit) const {
    if (taps == 0) return;
    int32_t s = first_tap % g.width.taps, r = first_tap / g.width.taps % g.height.taps;
    int32_t t = first_tap / g.width.taps / g.height.taps;
    for (int32_t i = 0; i < taps; ++i) {
      visit(i, t, r, s);
      if (++s < g.width.taps) continue;
      s = 0;
      if (++r < g.height.taps) continue;
      r = 0, ++t;
    }
  }

  void fill_out(const ImplicitGemm<T>& g, int32_t p, int32_t length, const Place& at) {
    const int64_t z = at.n * g.planes.out + g.planes.out_first + int64_t{g.planes.out_step} * at.z;
    const int64_t y = z * g.height.out + g.height.out_first + int64_t{g.height.out_step} * at.p;
    const int64_t x = g.width.out_first + int64_t{g.width.out_step} * at.q;
    const int64_t jump = int64_t{g.width.out_step} * g.out_pitch;
    T* const first = g.out + (y * g.width.out + x) * g.out_pitch;
    for (int32_t k = 0; k < length; ++k) out[p + k] = first + k * jump;
    for (int32_t k = 0; k < length; ++k) row_end[p + k] = p + length;
  }

  void fill_row(const ImplicitGemm<T>& g, const T** row, int32_t length, const Place& at, int32_t t, int32_t r,
                int32_t s) {
    const int64_t d = int64_t{g.planes.in_step} * at.z + g.planes.in_first + int64_t{g.planes.in_tap_step} * t;
    const int64_t h = int64_t{g.height.in_step} * at.p + g.height.in_first + int64_t{g.height.in_tap_step} * r;
    int64_t w = int64_t{g.width.in_step} * at.q + g.width.in_first + int64_t{g.width.in_tap_step} * s;
    int32_t k = 0;
    if (d >= 0 && d < g.planes.in && h >= 0 && h < g.height.in) {
      for (; k < length && w < 0; ++k, w += g.width.in_step) row[k] = g.zeros;
      padded |= k > 0;
      const int64_t inside = w < g.width.in ? (g.width.in - 1 - w) / g.width.in_step + 1 : 0;
      const int32_t end = at_most<int64_t>(inside, length - k) + k;
      const T* const first = g.in + (((at.n * g.planes.in + d) * g.height.in + h) * g.width.in + w) * g.in_pitch;
      const int64_t jump = int64_t{g.width.in_step} * g.in_pitch;
      for (int32_t from = k; k < end; ++k) row[k] = first + (k - from) * jump;
    }
    padded |= k < length;
    for (; k < length; ++k) row[k] = g.zeros;
  }
};

// The block cut into tiles for one width of panel, and the taps that each tile needs.
struct Tiles {
  int32_t vectors = 0;  // for which the rest holds
  int32_t count;
  int32_t begin[kMaxPixels + 1];
  int32_t taps_begin[kMaxPixels + 1];
  int32_t taps[kTablePointers];

  template <class T>
  void cut(const Table<T>& table, int32_t panel_vectors, bool within_rows, const T* zeros) {
    vectors = panel_vectors;
    count = 0;
    const int32_t most = max_rows(vectors);
    for (int32_t p = 0; p < table.pixels;) {
      const int32_t length = (within_rows ? table.row_end[p] : table.pixels) - p;
      const int32_t pieces = ceil_div(length, most);
      for (int32_t k = 0; k < pieces; ++k) begin[count++] = p + length * k / pieces;
      p += length;
    }
    begin[count] = table.pixels;
    int32_t total = 0;
    for (int32_t i = 0; i < count; ++i) {
      taps_begin[i] = total;
      for (int32_t t = 0; t < table.taps; ++t) {
        bool needed = !table.padded;
        for (int32_t p = begin[i]; p < begin[i + 1] && !needed; ++p) needed = table.rows[t * table.pixels + p] != zeros;
        if (needed) taps[total++] = t;
      }
    }
    taps_begin[count] = total;
  }
};

// One part of the reduction, taps [tap, tap_end) of the table and the depth that `args` says, for every tile. While it is
// multiplied, the next one, at `next`, comes closer, a share with each of the first tiles. With few pixels a part is used
// up faster than the hardware brings the next one from memory.
template <class T>
void run_part(TileArgs<T>& args, const Table<T>& table, const Tiles& tiles, int32_t tap, int32_t tap_end, const T* next,
              compute_t<T>* partial) {
  const int32_t vectors = tiles.vectors, lanes = vectors * Panels<T>::kWidth;
  const int64_t share = int64_t{args.depth} * (tap_end - tap) / kDepthStep<T> * kCacheLine / sizeof(T);
  next += share * vectors;
  for (int32_t i = 0; i < tiles.count; ++i) {
    args.ahead = i < vectors ? next + i * share : args.b;
    int32_t from = tiles.taps_begin[i], to = tiles.taps_begin[i + 1];
    while (from < to && tiles.taps[from] < tap) ++from;
    while (to > from && tiles.taps[to - 1] >= tap_end) --to;
    if (from == to && args.accumulate && !args.finish) continue;
    args.taps = tiles.taps + from;
    args.num_taps = to - from;
    args.rows = table.rows + tiles.begin[i];
    args.out = table.out + tiles.begin[i];
    if constexpr (!kPartialInOutput<T>) args.partial = partial + tiles.begin[i] * lanes;
    tile_kernel<T>(tiles.begin[i + 1] - tiles.begin[i], vectors)(args);
  }
}

// One block of pixels, one run of panels.
template <class T>
void run_item(const ImplicitGemm<T>& g, const Panels<T>& split, int64_t begin, int32_t pixels, int32_t panel_begin,
              int32_t panel_end) {
  using C = compute_t<T>;
  constexpr int32_t width = Panels<T>::kWidth;
  Table<T> table;
  Tiles tiles;
  [[maybe_unused]] C partial[kPartialInOutput<T> ? 1 : kMaxPixels * kMaxVectors * width];
  const int32_t all_taps = grid_taps(g);
  const int32_t taps_at_once = kTablePointers / pixels;
  const int64_t packed_tap = packed_depth<T>(g.depth);
  const Epilogue& epilogue = g.epilogue;

  TileArgs<T> args;
  args.rows_pitch = pixels;
  args.b_taps = table.b_taps;
  args.residual = static_cast<const T*>(epilogue.residual);
  args.out_base = g.out;
  args.activation = epilogue.activation;

  for (int32_t panel = panel_begin; panel < panel_end; ++panel) {
    const int32_t group = panel / split.count, local = panel % split.count;
    const int32_t vectors = split.width(local), lanes = vectors * width;
    const T* b = g.packed + g.packed_taps * packed_tap * (int64_t{group} * split.vectors + split.begin(local)) * width;
    const int64_t column = int64_t{group} * g.columns + split.first_column(local);
    args.b_tap_pitch = packed_tap * lanes;
    args.out_offset = column;
    args.columns = split.num_columns(local);
    args.scale = epilogue.scale ? static_cast<const C*>(epilogue.scale) + column : nullptr;
    args.shift = epilogue.shift ? static_cast<const C*>(epilogue.shift) + column : nullptr;

    // A part of the reduction: a run of whole taps, or a run of one tap's depth in whole steps.
    const int32_t most = static_cast<int32_t>(kPartBytes / sizeof(T)) / lanes;
    const int32_t depth_parts = at_least(1, ceil_div(g.depth, most));
    const int32_t depth_part = static_cast<int32_t>(packed_depth<T>(ceil_div(g.depth, depth_parts)));
    const int32_t tap_run = depth_parts > 1 ? 1 : most / at_least(1, g.depth);

    int32_t first_tap = 0;
    do {  // all taps at once, unless there are more than the table has room for
      const int32_t num_taps = at_most(taps_at_once, all_taps - first_tap);
      const bool last_taps = first_tap + num_taps == all_taps;
      if (table.first_tap != first_tap) {
        table.fill(g, begin, pixels, first_tap, num_taps);
        tiles.vectors = 0;
      }
      if (tiles.vectors != vectors) tiles.cut(table, vectors, g.tiles_within_rows, g.zeros);
      int32_t tap = 0;
      do {
        const int32_t tap_end = at_most(tap + tap_run, num_taps);
        int32_t depth_begin = 0;
        do {
          const int32_t depth_end = at_most(depth_begin + depth_part, g.depth);
          args.depth = depth_end - depth_begin;
          args.a_offset = int64_t{group} * g.depth + depth_begin;
          args.b = b + int64_t{depth_begin} * lanes;
          args.accumulate = first_tap + tap + depth_begin > 0;
          args.finish = last_taps && tap_end == num_taps && depth_end == g.depth;
          run_part(args, table, tiles, tap, tap_end, args.b + table.b_taps[tap] * args.b_tap_pitch, partial);
          depth_begin = depth_end;
        } while (depth_begin < g.depth);
        tap = tap_end;
      } while (tap < num_taps);
      first_tap += num_taps;
    } while (first_tap < all_taps);
  }
}

}  // namespace

template <class T>
void run_implicit_gemm(const ImplicitGemm<T>& g, const Parallel& parallel) {
  if (g.columns == 0 || g.batch == 0) return;
  if (g.planes.count <= 0 || g.height.count <= 0 || g.width.count <= 0) return;
  const Panels<T> split(g.columns);
  const Partition<T> partition(g, split, parallel.threads > 1 ? kItems : 1);
  // A thread takes items in a row: of a block of A where A is larger and the core keeps all of B, else of a run of B.
  const int64_t depth = int64_t{g.depth} * g.groups, b_rows = int64_t{g.packed_taps} * g.columns;
  const bool by_blocks = int64_t{g.batch} * g.planes.in * g.height.in * g.width.in > b_rows &&
                         b_rows * depth * static_cast<int64_t>(sizeof(T)) <= kKeptBytes;
  parallel.for_each(partition.blocks * partition.panel_runs, [&](int64_t item) {
    const int64_t run = by_blocks ? item % partition.panel_runs : item / partition.blocks;
    const int64_t block = by_blocks ? item / partition.panel_runs : item % partition.blocks;
    const int64_t begin = partition.block_begin(block);
    run_item(g, split, begin, static_cast<int32_t>(partition.block_begin(block + 1) - begin), partition.run_begin(run),
             partition.run_begin(run + 1));
  });
}

template <class T>
int64_t packed_elements(int32_t groups, int64_t taps, int32_t depth, int32_t columns) {
  constexpr int32_t width = Panels<T>::kWidth;
  return groups * taps * packed_depth<T>(depth) * ceil_div(columns, width) * width;
}

template <class T>
void pack_panels(const T* w, int64_t group_pitch, int64_t column_pitch, int64_t depth_pitch, int32_t groups,
                 int32_t taps, int32_t merged_taps, int32_t depth, int32_t columns, T* packed,
                 const Parallel& parallel) {
  if (columns == 0) return;
  constexpr int32_t width = Panels<T>::kWidth, step = kDepthStep<T>;
  const int64_t merged_depth = int64_t{merged_taps} * depth, packed_tap = packed_depth<T>(merged_depth);
  const Panels<T> split(columns);
  parallel.for_each(int64_t{groups} * split.count, [&](int64_t index) {
    const int32_t group = static_cast<int32_t>(index / split.count), panel = static_cast<int32_t>(index % split.count);
    const int32_t lanes = split.width(panel) * width, valid = split.num_columns(panel);
    T* to = packed + taps / merged_taps * packed_tap * (int64_t{group} * split.vectors + split.begin(panel)) * width;
    const T* from = w + group * group_pitch + split.first_column(panel) * column_pitch;
    for (int32_t tap = 0; tap < taps; tap += merged_taps, to += packed_tap * lanes) {
      for (int64_t l = 0; l < packed_tap; ++l) {
        T* row = to + l / step * step * lanes + l % step;
        const T* element = from + l % depth * depth_pitch + tap + l / depth;
        const int32_t present = l < merged_depth ? valid : 0;
        for (int32_t j = 0; j < present; ++j) row[j * step] = element[j * column_pitch];
        for (int32_t j = present; j < lanes; ++j) row[j * step] = T{};
      }
    }
  });
}

#define CONVEXT_INSTANTIATE(T, name)                                                                                 \
  template void run_implicit_gemm<T>(const ImplicitGemm<T>&, const Parallel&);                                       \
  template int64_t packed_elements<T>(int32_t, int64_t, int32_t, int32_t);                                           \
  template void pack_panels<T>(const T*, int64_t, int64_t, int64_t, int32_t, int32_t, int32_t, int32_t, int32_t, T*, \
                               const Parallel&);
CONVEXT_FOR_ELEMENTS(CONVEXT_INSTANTIATE)
#undef CONVEXT_INSTANTIATE

}  // namespace convext::CONVEXT_ISA
