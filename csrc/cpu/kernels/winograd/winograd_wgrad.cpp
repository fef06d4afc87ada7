// The weight gradient of 3x3 filters of stride 1, dilated or not, by the transposed form of Winograd's filtering
// (winograd.h). Y = A^T [(G g G^T) . (B^T d B)] A is linear in g, so for a gradient dY of one tile
//
//   dg = G^T [ sum_tiles (A dY A^T) . (B^T d B) ] G
//
// and the sum over the tiles is, for each position of the patch, a matrix product:
//
//   V[position]  (tiles, C)   B^T d B, as in fprop
//   D[position]  (tiles, K)   A dY A^T; outputs of the tile outside the image count as zero
//   S[position]  (K, C)       D^T V: a block of filters and a panel of channels at a time, all positions of it, then
//                             G^T S G, which is that part of dw
//
// 36 multiplications for the 16 outputs of a tile and nine taps, where the sum itself takes 144. The form for tiles of
// 2x2 would err more than the sum itself (docs/design.md), which is what that tile is for. Tiles are cut into shares
// whose V and D stay in a cache; the sums of the shares before wait in S. A share is a function of the problem alone
// and sums run in the order of the tiles: no result depends on threads.
//
// Filters with a tap that comes out infinite or NaN are summed directly, for the input channels where they do. No other
// needs it, as winograd_direct.h shows for outputs: a tap that is finite was made of finite values alone, and a pixel
// of x and one of dy that meet in tap r have  sum_p G_pr A_pa B_pi = 1,  so that the tap reads both at some position p.
#include "cpu/kernels/gemm/gemm_outer.h"
#include "cpu/kernels/gemm/gemm_wgrad.h"
#include "winograd_direct.h"
#include "winograd_passes.h"
#include "winograd_tile.h"

namespace convext::CONVEXT_ISA {
namespace {

constexpr int M = 4;
constexpr int kLanes = kMaxVectors * V::width;
// Bytes of V and D that a share aims for, and at most: rewriting S costs as much as reading half of as many bytes.
constexpr int64_t kShareBytes = 2 << 20, kMaxShareBytes = 32 << 20;
// Filters of a block: all positions of its sums stay in the second-level cache, and a panel of V is read so much rarer.
constexpr int32_t kBlockFilters = 48;
// With fewer tiles to sum over, the transforms' rounding is not outweighed by the shorter sums.
constexpr int64_t kLeastTiles = 32;

struct Plan {
  static constexpr int kPatch = M + 2, kPositions = kPatch * kPatch;

  const ConvProblem& p;
  Tiles<M> grid;
  int64_t tiles, shares, share_tiles;  // share_tiles: at most
  int64_t c_pitch, k_pitch;            // from tile to tile, of V and of D
  Panels<float> split;                 // of the channels
  int32_t filter_blocks;

  Plan(const ConvProblem& problem, int32_t threads)
      : p(problem),
        grid({p.h, p.p(), -p.pad_h, p.dil_h}, {p.w, p.q(), -p.pad_w, p.dil_w}),
        tiles(grid.count(p.n)),
        split(p.c) {
    c_pitch = row_pitch(p.c), k_pitch = row_pitch(p.k);
    const int64_t bytes = kPositions * tiles * (c_pitch + k_pitch) * 4, sums = kPositions * int64_t{p.c} * p.k * 4;
    int64_t wanted = 2 * sums > kShareBytes ? 2 * sums : kShareBytes;
    if (wanted > kMaxShareBytes) wanted = kMaxShareBytes;
    shares = bytes > wanted ? (bytes + wanted / 2) / wanted : 1;
    share_tiles = (tiles + shares - 1) / shares;
    // Items for every thread, in whole register tiles; how filters are cut changes no sum.
    const int32_t rows = max_rows(kMaxVectors), most = (p.k + rows - 1) / rows;
    const int32_t enough = (2 * threads + split.count - 1) / split.count;
    filter_blocks = (p.k + kBlockFilters - 1) / kBlockFilters;
    if (filter_blocks < enough) filter_blocks = enough;
    if (filter_blocks > most) filter_blocks = most;
  }

  // Whole vectors, and one more where rows would lie so far apart that they fall into the same few sets of a cache.
  static int64_t row_pitch(int32_t channels) {
    const int64_t whole = (channels + V::width - 1) / V::width * V::width;
    return whole < 256 ? whole : skewed(whole);
  }

  int64_t share_begin(int64_t share) const { return tiles * share / shares; }
  int32_t filter_begin(int64_t block) const { return static_cast<int32_t>(int64_t{p.k} * block / filter_blocks); }
  int64_t items() const { return int64_t{filter_blocks} * split.count; }

  int64_t v_pitch() const { return skewed(share_tiles * c_pitch); }  // from position to position
  int64_t d_pitch() const { return skewed(share_tiles * k_pitch); }
  int64_t block_filters() const { return (p.k + filter_blocks - 1) / filter_blocks; }  // at most
  int64_t sums_size() const { return kPositions * block_filters() * kLanes; }          // of an item

  // The workspace: a row of zeros, V, D, the sums of each item or, if none waits for another share, of each thread,
  // and pointers to the rows of D.
  int64_t zeros() const { return c_pitch > k_pitch ? c_pitch : k_pitch; }
  int64_t sums_count(int32_t threads) const { return shares > 1 ? items() : threads; }
  int64_t floats(int32_t threads) const {
    return zeros() + kPositions * (v_pitch() + d_pitch()) + sums_count(threads) * sums_size();
  }
};

// D of one tile: position i * (M + 2) + j goes to d + position * position_pitch. `next` is the tile to come.
void spread_tile(const Plan& plan, const float* dy, const float* zeros, Tile tile, Tile next, float* d,
                 int64_t position_pitch) {
  constexpr int kPatch = M + 2;
  const WinogradAxis &height = plan.grid.height, &width = plan.grid.width;
  const int32_t channels = plan.p.k;
  const Ahead ahead(dy, height.out, width.out, channels, next.n, next.h, next.w, height.step, width.step);
  const int32_t rows = valid_outputs<M>(height, tile.h), columns = valid_outputs<M>(width, tile.w);
  const float* patch[M][M];
  for (int a = 0; a < M; ++a) {
    const int64_t row = (tile.n * height.out + tile.h + int64_t{a} * height.step) * width.out + tile.w;
    for (int b = 0; b < M; ++b) {
      patch[a][b] = a < rows && b < columns ? dy + (row + int64_t{b} * width.step) * channels : zeros;
    }
  }
  for (int32_t l = 0; l < channels; l += V::width) {
    const Lanes<float> lanes(channels - l);
    ahead.fetch<M, 0, false>(l * int64_t{sizeof(float)});
    V half[kPatch][M];  // [column of dY A^T][row of dY]
    CONVEXT_UNROLL
    for (int a = 0; a < M; ++a) {
      V y[M], row[kPatch];
      CONVEXT_UNROLL
      for (int b = 0; b < M; ++b) y[b] = load(patch[a][b] + l, lanes);
      Transform<M>::output_transposed(y, row);
      CONVEXT_UNROLL
      for (int j = 0; j < kPatch; ++j) half[j][a] = row[j];
    }
    CONVEXT_UNROLL
    for (int j = 0; j < kPatch; ++j) {
      V column[kPatch];
      Transform<M>::output_transposed(half[j], column);
      CONVEXT_UNROLL
      for (int i = 0; i < kPatch; ++i) store(d + (i * kPatch + j) * position_pitch + l, column[i]);
    }
  }
}

// Adds the share's tiles to the sums of filters [begin, end) and one panel: [position][filter][vectors * width].
void multiply(const Plan& plan, const float* v, const float* const* d_rows, int32_t tiles, int32_t begin, int32_t end,
              int32_t panel, bool accumulate, float* sums) {
  const int32_t vectors = plan.split.width(panel), lanes = vectors * V::width;
  const int32_t filters = end - begin, most = max_rows(vectors), pieces = (filters + most - 1) / most;
  OuterArgs<float> args{};
  args.dy = d_rows;
  args.x_pitch = plan.c_pitch;
  args.pixels = tiles;
  args.accumulate = accumulate;
  for (int position = 0; position < Plan::kPositions; ++position) {
    args.x = v + position * plan.v_pitch() + plan.split.first_column(panel);
    for (int32_t i = 0; i < pieces; ++i) {
      const int32_t first = filters * i / pieces, last = filters * (i + 1) / pieces;
      args.offset = position * plan.d_pitch() + begin + first;
      args.out = sums + (int64_t{position} * filters + first) * lanes;
      outer_table<float>.of(last - first, vectors)(args);
    }
  }
}

// G^T S G into dw, KCRS. Whether all of it is finite, as one sum of all says, which may overflow by itself.
bool finish(const Plan& plan, int32_t begin, int32_t end, int32_t panel, const float* sums, float* dw) {
  constexpr int kPatch = M + 2;
  const int32_t lanes = plan.split.width(panel) * V::width, filters = end - begin;
  const int32_t columns = plan.split.num_columns(panel), first = plan.split.first_column(panel);
  V all = V::zero();
  for (int32_t k = 0; k < filters; ++k) {
    for (int32_t j = 0; j < columns; j += V::width) {
      const float* const from = sums + int64_t{k} * lanes + j;
      const int64_t position_pitch = int64_t{filters} * lanes;
      V half[3][kPatch];  // G^T S
      CONVEXT_UNROLL
      for (int b = 0; b < kPatch; ++b) {
        V column[kPatch], taps[3];
        CONVEXT_UNROLL
        for (int a = 0; a < kPatch; ++a) column[a] = load(from + (a * kPatch + b) * position_pitch);
        Transform<M>::filter_transposed(column, taps);
        CONVEXT_UNROLL
        for (int r = 0; r < 3; ++r) half[r][b] = taps[r];
      }
      alignas(64) float block[9][V::width];
      CONVEXT_UNROLL
      for (int r = 0; r < 3; ++r) {
        V taps[3];
        Transform<M>::filter_transposed(half[r], taps);
        all += (taps[0] + taps[1]) + taps[2];
        CONVEXT_UNROLL
        for (int s = 0; s < 3; ++s) store(block[3 * r + s], taps[s]);
      }
      float* const to = dw + (int64_t{begin + k} * plan.p.c + first + j) * 9;
      const int32_t count = columns - j < V::width ? columns - j : V::width;
      for (int32_t c = 0; c < count; ++c) {
        CONVEXT_UNROLL
        for (int tap = 0; tap < 9; ++tap) to[c * 9 + tap] = block[tap][c];
      }
    }
  }
  return !any_nonfinite(all);
}

// ---- Sums that are not finite ----

bool all_finite(const float* taps) {
  float zeros = 0;
  for (int tap = 0; tap < 9; ++tap) zeros += taps[tap] - taps[tap];
  return zeros == 0;
}

// The numbers of the channels of which `set` is true, in order; returns how many.
template <class F>
int32_t list_channels(int32_t channels, int32_t* list, F&& set) {
  int32_t count = 0;
  for (int32_t i = 0; i < channels; ++i) {
    if (set(i)) list[count++] = i;
  }
  return count;
}

// The pixels of an axis at which a tap meets the image: outputs [begin, end), which read inputs from begin + shift on.
struct Met {
  int32_t begin, end, shift;
  Met(const WinogradAxis& axis, int32_t tap) {
    const int64_t first = int64_t{axis.offset} + int64_t{tap} * axis.step;
    shift = static_cast<int32_t>(first);
    begin = first < 0 ? static_cast<int32_t>(-first < axis.out ? -first : axis.out) : 0;
    const int64_t last = axis.in - first;
    end = last < axis.out ? static_cast<int32_t>(last) : axis.out;
    if (end < begin) end = begin;
  }
  int32_t count() const { return end - begin; }
};

// The listed channels of a rectangle of (batch, height, width, channels), side by side.
void crop(const float* from, int32_t batch, int32_t height, int32_t width, int32_t channels, int32_t row, int32_t rows,
          int32_t column, int32_t columns, const int32_t* list, int32_t listed, float* to, const Parallel& parallel) {
  parallel.for_each(int64_t{batch} * rows, [&](int64_t i) {
    const float* pixel = from + ((i / rows * height + row + i % rows) * width + column) * channels;
    float* out = to + i * columns * listed;
    for (int32_t j = 0; j < columns; ++j, pixel += channels, out += listed) {
      for (int32_t l = 0; l < listed; ++l) out[l] = pixel[list[l]];
    }
  });
}

// Sums of dw that are not finite once more, as plain sums: a matrix product for each tap, over the pixels where the tap
// meets the image, for the filters and the channels that hold one. That is at most what the direct form computes.
const char* sum_nonfinite(const Plan& plan, const float* dy, const float* x, float* dw, const Parallel& parallel) {
  const ConvProblem& p = plan.p;
  const RareMemory<uint8_t> marks(int64_t{p.k} + p.c);
  const RareMemory<int32_t> lists(int64_t{p.k} + p.c);
  if (!marks.data || !lists.data) return kNoMemory;
  uint8_t *const k_marks = marks.data, *const c_marks = k_marks + p.k;
  int32_t *const k_list = lists.data, *const c_list = k_list + p.k;
  std::memset(marks.data, 0, int64_t{p.k} + p.c);
  for (int32_t k = 0; k < p.k; ++k) {
    for (int32_t c = 0; c < p.c; ++c) {
      if (!all_finite(dw + (int64_t{k} * p.c + c) * 9)) k_marks[k] = c_marks[c] = 1;
    }
  }
  ConvProblem one = p;  // tap
  one.k = list_channels(p.k, k_list, [&](int32_t k) { return k_marks[k] != 0; });
  one.c = list_channels(p.c, c_list, [&](int32_t c) { return c_marks[c] != 0; });
  if (one.k == 0) return nullptr;
  one.r = one.s = 1, one.pad_h = one.pad_w = 0, one.dil_h = one.dil_w = 1;

  const int64_t filters = int64_t{one.k} * one.c;
  const RareMemory<float> sums(9 * filters), dy_crop(p.npq() * one.k), x_crop(p.npq() * one.c);
  if (!sums.data || !dy_crop.data || !x_crop.data) return kNoMemory;
  for (int32_t tap = 0; tap < 9; ++tap) {
    const Met rows(plan.grid.height, tap / 3), columns(plan.grid.width, tap % 3);
    float* const out = sums.data + tap * filters;
    one.h = rows.count(), one.w = columns.count();
    if (one.h == 0 || one.w == 0) {
      std::memset(out, 0, filters * sizeof(float));
      continue;
    }
    crop(dy, p.n, p.p(), p.q(), p.k, rows.begin, one.h, columns.begin, one.w, k_list, one.k, dy_crop.data, parallel);
    crop(x, p.n, p.h, p.w, p.c, rows.begin + rows.shift, one.h, columns.begin + columns.shift, one.w, c_list, one.c,
         x_crop.data, parallel);
    const RareMemory<char> workspace(wgrad_workspace<float>(one, parallel.threads));
    if (!workspace.data) return kNoMemory;
    LaunchArgs args{};
    args.a = dy_crop.data, args.b = x_crop.data, args.out = out;
    args.workspace = workspace.data;
    args.parallel = &parallel;
    if (const char* why = wgrad_launch<float>(one, args)) return why;
  }
  for (int32_t k = 0; k < one.k; ++k) {
    for (int32_t c = 0; c < one.c; ++c) {
      float* const taps = dw + (int64_t{k_list[k]} * p.c + c_list[c]) * 9;
      if (all_finite(taps)) continue;
      for (int32_t tap = 0; tap < 9; ++tap) taps[tap] = sums.data[tap * filters + int64_t{k} * one.c + c];
    }
  }
  return nullptr;
}

struct WinogradWgrad {
  static const char* reject(const ConvProblem& p) {
    if (const char* why = reject_winograd(p, kWinogradDepth)) return why;
    return Tiles<M>({p.h, p.p(), -p.pad_h, p.dil_h}, {p.w, p.q(), -p.pad_w, p.dil_w}).count(p.n) < kLeastTiles
               ? "Winograd needs at least 32 tiles of outputs to sum over"
               : nullptr;
  }

  static int64_t workspace(const ConvProblem& p, int32_t threads) {
    const Plan plan(p, threads > 1 ? threads : 1);
    return align64(plan.floats(threads > 1 ? threads : 1) * 4) + plan.share_tiles * int64_t{sizeof(float*)};
  }

  static const char* launch(const ConvProblem& p, const LaunchArgs& args) {
    const Parallel& parallel = *args.parallel;
    const int32_t threads = parallel.threads > 1 ? parallel.threads : 1;
    const Plan plan(p, threads);
    Winograd<float> g{};
    g.in = static_cast<const float*>(args.b);
    g.batch = p.n, g.depth = p.c, g.columns = p.k;
    g.height = plan.grid.height, g.width = plan.grid.width;
    const float* const dy = static_cast<const float*>(args.a);
    float* const dw = static_cast<float*>(args.out);
    float* const zeros = static_cast<float*>(args.workspace);
    float* const v = zeros + plan.zeros();
    float* const d = v + Plan::kPositions * plan.v_pitch();
    float* const sums = d + Plan::kPositions * plan.d_pitch();
    const float** const d_rows =
        reinterpret_cast<const float**>(static_cast<char*>(args.workspace) + align64(plan.floats(threads) * 4));
    for (int64_t l = 0; l < plan.zeros(); ++l) zeros[l] = 0;
    for (int64_t t = 0; t < plan.share_tiles; ++t) d_rows[t] = d + t * plan.k_pitch;
    bool finite = true;
    for (int64_t share = 0; share < plan.shares; ++share) {
      const int64_t begin = plan.share_begin(share), tiles = plan.share_begin(share + 1) - begin;
      parallel.for_each(tiles, [&](int64_t t) {
        const Tile tile = plan.grid.at(begin + t), next = plan.grid.at(begin + t + 1);
        gather_tile<M>(g, zeros, tile, next, 0, g.depth, v + t * plan.c_pitch, plan.v_pitch());
        spread_tile(plan, dy, zeros, tile, next, d + t * plan.k_pitch, plan.d_pitch());
      });
      parallel.for_each(threads, [&](int64_t thread) {
        for (int64_t item = plan.items() * thread / threads; item < plan.items() * (thread + 1) / threads; ++item) {
          const int64_t block = item % plan.filter_blocks;
          const int32_t panel = static_cast<int32_t>(item / plan.filter_blocks);
          const int32_t first = plan.filter_begin(block), last = plan.filter_begin(block + 1);
          float* const part = sums + (plan.shares > 1 ? item : thread) * plan.sums_size();
          multiply(plan, v, d_rows, static_cast<int32_t>(tiles), first, last, panel, share > 0, part);
          if (share + 1 == plan.shares && !finish(plan, first, last, panel, part, dw)) {
            __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
          }
        }
      });
    }
    return finite ? nullptr : sum_nonfinite(plan, dy, g.in, dw, parallel);
  }
};

}  // namespace
}  // namespace convext::CONVEXT_ISA

CONVEXT_DEFINE_VARIANT_OF(float, f32, wgrad_winograd4x4,
                          winograd_variant(cpu_variant<T>(name, Algorithm::winograd, Pass::kWgrad,
                                                          WinogradWgrad::reject, WinogradWgrad::launch, winograd_work,
                                                          WinogradWgrad::workspace),
                                           M))
