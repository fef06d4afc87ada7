// Compiled for AVX512-BF16, too.
//
// Winograd's minimal filtering (winograd.h):
//
//   Y = A^T [ (G g G^T) . (B^T d B) ] A        d a patch of the input, g a 3x3 filter, Y a tile of the output
//
// for each channel and column. The sum over the channels of the products in the middle is, for each position of the
// patch, a matrix product:
//
//   V[position]  (tiles, depth)    B^T d B of a block of tiles
//   U[position]  (depth, columns)  G g G^T, packed once, panel by panel: [panel][position][depth][vectors * width]
//   M[position]  (tiles, columns)  V U, one panel at a time; then A^T M A, the epilogue, and the output
//
// The transforms are Toom-Cook's: with M(x) the product of (x - a_i) over the finite points a_i,
//   row i of B^T: the coefficients of M(x) / (x - a_i);  row i of G: (1, a_i, a_i^2) / M'(a_i);  column i of A^T: a_i^k
// and for F(2) rows scaled so that B^T and A^T hold 0 and +-1 alone. The points +-3/4, +-3/2 of F(4) lose fewer bits
// than the usual +-1, +-2: the transforms' entries are closer to one another in size; so do +-1/2, +-5/4 of F(3).
#include "winograd.h"

#include "cpu/kernels/gemm/gemm_passes.h"
#include "cpu/simd/registers.h"
#include "winograd_direct.h"
#include "winograd_tile.h"

namespace convext::CONVEXT_ISA {
namespace {

constexpr int kLanes = kMaxVectors * V::width;

// Tiles of a block, at most. Fewer read the weights more often, more push M and what of V is in use out of the
// second-level cache; measured best from 64 to 512 channels.
constexpr int32_t kBlockTiles = 48;
// With more channels than this V of such a block would push everything else out of the caches. Then the channels are
// taken in chunks, and M of all panels waits for the next one. That leaves room for more tiles.
constexpr int32_t kWholeDepth = 512, kChunkDepth = 128, kChunkTiles = 144;
// Depth of a part of U that stays in the first-level cache while the block's tiles pass over it.
constexpr int32_t kPartDepth = 16384 / (kLanes * 4);
// From this many channels on the sum is taken in two parts at least: a chain's rounding grows with its length.
constexpr int32_t kTwoParts = 64;
// Bytes of weights that stay in the second-level cache from block to block.
constexpr int64_t kCachedWeights = 512 << 10;

// ---- The product ----

// One tile of M = V U, of ROWS x VECTORS registers. Each step also prefetches `ahead` vectors of the weights that come
// next: with few rows they are used up faster than the hardware's own prefetching brings them.
struct Product {
  const float* v;  // row i at v + i * v_pitch
  int64_t v_pitch;
  const float* u;  // (depth, VECTORS * width)
  int32_t depth;
  float* m;         // row i at m + i * kLanes
  bool accumulate;  // add to what m holds
  const float* ahead;
  int32_t ahead_vectors;
};

template <int ROWS, int VECTORS>
void product(const Product& args) {
  V acc[ROWS][VECTORS];
  unrolled<ROWS, VECTORS>([&](int i, int j) CONVEXT_LAMBDA_INLINE { acc[i][j] = V::zero(); });
  const float* a[ROWS];
  CONVEXT_UNROLL
  for (int i = 0; i < ROWS; ++i) a[i] = args.v + i * args.v_pitch;
  const float *u = args.u, *ahead = args.ahead;
  const int32_t ahead_vectors = args.ahead_vectors;
  const auto step = [&](int64_t l) {
    add_outer(acc, [&](int i) CONVEXT_LAMBDA_INLINE { return V(a[i][l]); },
              [&](int j) CONVEXT_LAMBDA_INLINE { return load(u + j * V::width); });
    u += VECTORS * V::width;
  };
  if (ahead_vectors > 0) {
    for (int64_t l = 0; l < args.depth; ++l) {
      for (int32_t j = 0; j < ahead_vectors; ++j) __builtin_prefetch(ahead + j * V::width, 0, 2);
      ahead += ahead_vectors * V::width;
      step(l);
    }
  } else {
    for (int64_t l = 0; l < args.depth; ++l) step(l);
  }
  unrolled<ROWS, VECTORS>([&](int i, int j) CONVEXT_LAMBDA_INLINE {
    float* to = args.m + i * kLanes + j * V::width;
    store(to, args.accumulate ? acc[i][j] + load(to) : acc[i][j]);
  });
}

using ProductKernel = void (*)(const Product&);

constexpr TileTable<ProductKernel> kProducts([](auto r, auto v) { return product<r.value, v.value>; });

// ---- The plan ----

template <int M>
struct Plan {
  static constexpr int kPatch = M + 2, kPositions = kPatch * kPatch;

  Tiles<M> grid;
  int64_t tiles;
  int64_t blocks;
  int64_t block_tiles;    // at most
  int32_t depth, chunks;  // of the channels: as many times the sums in M are added to
  int32_t pitch;          // of V: a chunk's depth in whole vectors
  Panels<float> split;
  int32_t panel_runs;  // of a block, an item each

  template <class T>
  Plan(const Winograd<T>& g, int32_t threads) : grid(g.height, g.width), tiles(grid.count(g.batch)), split(g.columns) {
    depth = g.depth;
    chunks = depth > kWholeDepth ? (depth + kChunkDepth - 1) / kChunkDepth : 1;
    pitch = chunks > 1 ? kChunkDepth : (depth + V::width - 1) / V::width * V::width;
    const int32_t most = chunks > 1 ? kChunkTiles : kBlockTiles;
    blocks = (tiles + most - 1) / most;
    // As many items for one thread as for another. Where blocks are few, threads share them panel by panel, and each
    // transforms the block for itself: that takes less time than another core's cache.
    panel_runs = 1;
    if (blocks >= threads) {
      blocks = (blocks + threads - 1) / threads * threads;
    } else if (blocks > 0) {
      const int64_t wanted = (threads + blocks - 1) / blocks;
      panel_runs = static_cast<int32_t>(wanted < split.count ? wanted : split.count);
    }
    block_tiles = blocks > 0 ? (tiles + blocks - 1) / blocks : 0;
  }
  int64_t block_begin(int64_t block) const { return tiles * block / blocks; }
  int32_t run_begin(int64_t run) const { return static_cast<int32_t>(int64_t{split.count} * run / panel_runs); }

  int32_t chunk_begin(int32_t chunk) const { return chunk * kChunkDepth; }
  int32_t chunk_end(int32_t chunk) const { return chunk + 1 < chunks ? chunk_begin(chunk + 1) : depth; }

  int64_t v_pitch() const { return skewed(block_tiles * pitch); }  // from position to position
  int64_t m_pitch() const { return skewed(block_tiles * kLanes); }
  int64_t m_panel() const { return kPositions * m_pitch(); }  // from panel to panel, where several wait
  int32_t waiting_panels() const { return chunks > 1 ? (split.count + panel_runs - 1) / panel_runs : 1; }

  // The workspace: a row of zeros, a flag for each tile, then V and M of each thread.
  int64_t flags_bytes() const { return align64(tiles); }
  int64_t zeros_bytes() const { return align64((int64_t{depth} + V::width) * 4); }
  int64_t slot_bytes() const { return align64((kPositions * v_pitch() + waiting_panels() * m_panel()) * 4); }
};

// ---- The output transform ----

// The output of one tile and one panel: A^T M A, the epilogue, the part of the tile that lies inside. Sets `flag` where
// an output is not finite before the epilogue, which may hide it: relu6(infinity) is 6. The sum of all outputs says
// so, which is not finite if one of them is not. It may overflow by itself, which costs time alone.
template <int M, class T, class F>
CONVEXT_INLINE void scatter_tile(const Winograd<T>& g, Tile tile, Tile next, const float* m, int64_t position_pitch,
                                 int32_t first_column, int32_t columns, F activation, uint8_t* flag) {
  constexpr int kPatch = M + 2;
  const Ahead ahead(g.out, g.height.out, g.width.out, g.columns, next.n, next.h, next.w, g.height.step, g.width.step);
  const float* scales = static_cast<const float*>(g.epilogue.scale);
  const float* shifts = static_cast<const float*>(g.epilogue.shift);
  const T* residual = static_cast<const T*>(g.epilogue.residual);
  const int32_t height = valid_outputs<M>(g.height, tile.h), width = valid_outputs<M>(g.width, tile.w);
  const int64_t step = int64_t{g.width.step} * g.columns;
  V all = V::zero();
  for (int32_t j = 0; j < columns; j += V::width) {
    const Lanes<float> lanes(columns - j);
    ahead.fetch<M, 0, true>((first_column + j) * int64_t{sizeof(T)});
    V half[M][kPatch];  // A^T M
    CONVEXT_UNROLL
    for (int b = 0; b < kPatch; ++b) {
      V column[kPatch], y[M];
      CONVEXT_UNROLL
      for (int a = 0; a < kPatch; ++a) column[a] = load(m + (a * kPatch + b) * position_pitch + j);
      Transform<M>::output(column, y);
      CONVEXT_UNROLL
      for (int a = 0; a < M; ++a) half[a][b] = y[a];
    }
    const V scale = scales ? load(scales + first_column + j, lanes) : V(1.0f);
    const V shift = shifts ? load(shifts + first_column + j, lanes) : V::zero();
    for (int32_t a = 0; a < height; ++a) {
      V y[M];
      Transform<M>::output(half[a], y);
      V row = y[0];
      CONVEXT_UNROLL
      for (int b = 1; b < M; ++b) row += y[b];
      all += row;
      const int64_t h = int64_t{tile.h} + int64_t{a} * g.height.step;
      const int64_t at = ((tile.n * g.height.out + h) * g.width.out + tile.w) * g.columns + first_column + j;
      CONVEXT_UNROLL
      for (int b = 0; b < M; ++b) {
        if (b >= width) break;
        V value = y[b] * scale + shift;
        if (residual) value += load_as(residual + at + b * step, lanes);
        store_as(g.out + at + b * step, activation.forward(value), lanes);
      }
    }
  }
  // Threads that share the block's panels may set it at once.
  if (any_nonfinite(all)) __atomic_store_n(flag, uint8_t{1}, __ATOMIC_RELAXED);
}

// ---- One item of work: a block of tiles and a run of panels ----

// M = V U for one panel, all positions and one chunk of the channels.
template <int M>
void multiply(const Plan<M>& plan, int32_t chunk, const float* v, const float* u, int32_t tiles, int32_t vectors,
              bool fetch_ahead, float* m) {
  const int32_t lanes = vectors * V::width, most = max_rows(vectors), pieces = (tiles + most - 1) / most;
  const int32_t chunk_begin = plan.chunk_begin(chunk), depth = plan.chunk_end(chunk) - chunk_begin;
  const int32_t parts = std::max((depth + kPartDepth - 1) / kPartDepth, depth >= kTwoParts ? 2 : 1);
  // The pieces of a part ask for the next part between them.
  const int32_t ahead = fetch_ahead ? (vectors + pieces - 1) / pieces : 0;
  Product args;
  args.v_pitch = plan.pitch;
  for (int position = 0; position < Plan<M>::kPositions; ++position) {
    const float* const weights = u + (int64_t{position} * plan.depth + chunk_begin) * lanes;
    for (int32_t part = 0; part < parts; ++part) {
      const int32_t begin = depth * part / parts;
      args.depth = depth * (part + 1) / parts - begin;
      args.u = weights + int64_t{begin} * lanes;
      args.accumulate = chunk > 0 || part > 0;
      const float* const next =
          part + 1 < parts ? args.u + int64_t{args.depth} * lanes : weights + int64_t{plan.depth} * lanes;
      for (int32_t i = 0; i < pieces; ++i) {
        const int32_t first = tiles * i / pieces, last = tiles * (i + 1) / pieces;
        args.v = v + position * plan.v_pitch() + int64_t{first} * plan.pitch + begin;
        args.m = m + position * plan.m_pitch() + int64_t{first} * kLanes;
        args.ahead_vectors = i * ahead < vectors ? ahead : 0;
        args.ahead = next + int64_t{i} * ahead * V::width * args.depth;
        kProducts.of(last - first, vectors)(args);
      }
    }
  }
}

template <int M, class T>
void gather_chunk(const Winograd<T>& g, const Plan<M>& plan, int64_t block, int32_t chunk, const T* zeros, float* v) {
  const int64_t begin = plan.block_begin(block), end = plan.block_begin(block + 1);
  for (int64_t t = begin; t < end; ++t) {
    gather_tile<M>(g, zeros, plan.grid.at(t), plan.grid.at(t + 1), plan.chunk_begin(chunk), plan.chunk_end(chunk),
                   v + (t - begin) * plan.pitch, plan.v_pitch());
  }
}

// `v` holds the chunk; where it is the last one, the outputs follow.
template <int M, class T>
void run_chunk(const Winograd<T>& g, const Plan<M>& plan, int64_t block, int64_t run, int32_t chunk, const float* v,
               float* m, uint8_t* flags) {
  const int64_t begin = plan.block_begin(block);
  const int32_t tiles = static_cast<int32_t>(plan.block_begin(block + 1) - begin);
  const bool fetch_ahead = Plan<M>::kPositions * int64_t{g.depth} * g.columns * 4 > kCachedWeights;
  for (int32_t panel = plan.run_begin(run); panel < plan.run_begin(run + 1); ++panel) {
    const float* u = g.packed + int64_t{Plan<M>::kPositions} * g.depth * plan.split.begin(panel) * V::width;
    multiply<M>(plan, chunk, v, u, tiles, plan.split.width(panel), fetch_ahead, m);
    if (chunk + 1 == plan.chunks) {
      visit_activation<V>(g.epilogue.activation, [&](auto f) {
        for (int32_t t = 0; t < tiles; ++t) {
          scatter_tile<M>(g, plan.grid.at(begin + t), plan.grid.at(begin + t + 1), m + int64_t{t} * kLanes,
                          plan.m_pitch(), plan.split.first_column(panel), plan.split.num_columns(panel), f,
                          flags + begin + t);
        }
      });
    }
    if (plan.chunks > 1) m += plan.m_panel();
  }
}

// ---- The weights ----

// The transforms of the weights run in float64 and round once, at their end. Half a vector of float32 is as many
// elements as a vector of float64.
using Wide = Vec<double>;
typedef float HalfVector __attribute__((vector_size(kVectorBytes / 2), aligned(alignof(float)), may_alias));

CONVEXT_INLINE Wide widen(const float* from) {
  return __builtin_convertvector(*reinterpret_cast<const HalfVector*>(from), Native<double>::type);
}
CONVEXT_INLINE void round_to(float* to, Wide from) {
  *reinterpret_cast<HalfVector*>(to) = __builtin_convertvector(from.v, HalfVector);
}

// G g G^T of one vector of filters whose taps lie kLanes apart; position i goes to u + i * position_pitch.
template <int M>
void transform_filters(const float* taps, float* u, int64_t position_pitch) {
  constexpr int kPatch = M + 2;
  Wide rows[kPatch][3];  // G g
  CONVEXT_UNROLL
  for (int s = 0; s < 3; ++s) {
    Wide column[kPatch];
    Transform<M>::filter(widen(taps + s * kLanes), widen(taps + (3 + s) * kLanes), widen(taps + (6 + s) * kLanes),
                         column);
    CONVEXT_UNROLL
    for (int i = 0; i < kPatch; ++i) rows[i][s] = column[i];
  }
  CONVEXT_UNROLL
  for (int i = 0; i < kPatch; ++i) {
    Wide row[kPatch];
    Transform<M>::filter(rows[i][0], rows[i][1], rows[i][2], row);
    CONVEXT_UNROLL
    for (int j = 0; j < kPatch; ++j) round_to(u + (i * kPatch + j) * position_pitch, row[j]);
  }
}

constexpr int32_t kPackRun = 8;  // of the depth: what is read of a filter, and written of a position, in one go

}  // namespace

template <int M>
int64_t winograd_packed_elements(int32_t depth, int32_t columns) {
  return Plan<M>::kPositions * int64_t{depth} * Panels<float>(columns).vectors * V::width;
}

template <int M, class T>
void winograd_pack(const Winograd<T>& g, const T* w, float* packed, const Parallel& parallel) {
  const int32_t depth = g.depth, columns = g.columns;
  if (columns == 0) return;
  constexpr int kPositions = Plan<M>::kPositions;
  constexpr int64_t kPitch = skewed(kPackRun * kLanes);
  const Panels<float> split(columns);
  const int64_t runs = (depth + kPackRun - 1) / kPackRun;
  parallel.for_each(split.count * runs, [&](int64_t item) {
    const int32_t panel = static_cast<int32_t>(item / runs), lanes = split.width(panel) * V::width;
    const int32_t begin = static_cast<int32_t>(item % runs) * kPackRun;
    const int32_t run = depth - begin < kPackRun ? depth - begin : kPackRun;
    float taps[kPackRun][9][kLanes] = {};
    for (int32_t j = 0; j < split.num_columns(panel); ++j) {
      const T* filter = w + (split.first_column(panel) + j) * g.column_pitch + begin * g.depth_pitch;
      for (int32_t l = 0; l < run; ++l, filter += g.depth_pitch) {
        for (int tap = 0; tap < 9; ++tap) taps[l][tap][j] = to_compute(filter[g.rotated ? 8 - tap : tap]);
      }
    }
    float u[kPositions * kPitch];
    for (int32_t l = 0; l < run; ++l) {
      for (int32_t j = 0; j < lanes; j += Wide::width) {
        transform_filters<M>(&taps[l][0][j], u + l * lanes + j, kPitch);
      }
    }
    float* to = packed + int64_t{kPositions} * depth * split.begin(panel) * V::width + int64_t{begin} * lanes;
    for (int position = 0; position < kPositions; ++position, to += int64_t{depth} * lanes) {
      for (int32_t i = 0; i < run * lanes; i += V::width) store(to + i, load(u + position * kPitch + i));
    }
  });
}

template <int M, class T>
int64_t winograd_workspace(const Winograd<T>& g, int32_t threads) {
  const Plan<M> plan(g, threads > 1 ? threads : 1);
  return plan.zeros_bytes() + plan.flags_bytes() + (threads > 1 ? threads : 1) * plan.slot_bytes();
}

template <int M, class T>
const char* run_winograd(const Winograd<T>& g, void* workspace, const Parallel& parallel) {
  const int32_t slots = parallel.threads > 1 ? parallel.threads : 1;
  const Plan<M> plan(g, slots);
  if (g.weights.get == nullptr) return "it was not given the weights unpacked, which it may need";
  if (plan.tiles == 0 || g.columns == 0) return nullptr;
  T* const zeros = static_cast<T*>(workspace);
  for (int32_t l = 0; l < g.depth; ++l) zeros[l] = T{};
  uint8_t* const flags = static_cast<uint8_t*>(workspace) + plan.zeros_bytes();
  std::memset(flags, 0, plan.tiles);
  char* const slots_memory = reinterpret_cast<char*>(flags) + plan.flags_bytes();
  const int64_t items = plan.blocks * plan.panel_runs;
  parallel.for_each(slots, [&](int64_t slot) {
    float* const v = reinterpret_cast<float*>(slots_memory + slot * plan.slot_bytes());
    const int64_t first = items * slot / slots, last = items * (slot + 1) / slots;
    for (int64_t item = first; item < last; ++item) {
      const int64_t block = item / plan.panel_runs, run = item % plan.panel_runs;
      for (int32_t chunk = 0; chunk < plan.chunks; ++chunk) {
        if (plan.chunks > 1 || item == first || run == 0) gather_chunk<M>(g, plan, block, chunk, zeros, v);
        run_chunk<M>(g, plan, block, run, chunk, v, v + Plan<M>::kPositions * plan.v_pitch(), flags);
      }
    }
  });
  return std::memchr(flags, 1, plan.tiles) == nullptr ? nullptr : sum_flagged_tiles<M>(g, plan.grid, flags, parallel);
}

#define CONVEXT_INSTANTIATE(T, name, M)                                                     \
  template int64_t winograd_packed_elements<M>(int32_t, int32_t);                           \
  template void winograd_pack<M, T>(const Winograd<T>&, const T*, float*, const Parallel&); \
  template int64_t winograd_workspace<M, T>(const Winograd<T>&, int32_t);                   \
  template const char* run_winograd<M, T>(const Winograd<T>&, void*, const Parallel&);
CONVEXT_FOR_WINOGRAD(CONVEXT_INSTANTIATE, 2)
CONVEXT_FOR_WINOGRAD(CONVEXT_INSTANTIATE, 3)
CONVEXT_FOR_WINOGRAD(CONVEXT_INSTANTIATE, 4)
#undef CONVEXT_INSTANTIATE

}  // namespace convext::CONVEXT_ISA
