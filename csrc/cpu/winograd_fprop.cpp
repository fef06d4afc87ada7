// fprop of 3x3 filters by Winograd's minimal filtering F(4x4, 3x3): 36 multiplications for 16 outputs instead of 144.
//
//   Y = A^T [ (G g G^T) . (B^T d B) ] A        d a 6x6 patch of x, g a 3x3 filter, Y a 4x4 tile of y, for each (c, k)
//
// The sum over c of the products in the middle is, for each of the 36 positions, a matrix product:
//
//   V[position]  (tiles, C)   B^T d B, a block of 24 to 48 tiles, in the workspace
//   U[position]  (C, K)       G g G^T, packed once, panel by panel: [panel][position][c][vectors * width]
//   M[position]  (tiles, K)   V U, one panel of K at a time; then A^T M A, the epilogue, and y
//
// The points are 0, +-3/4, +-3/2 and infinity (Toom-Cook); with p = 3/4 and q = 3/2, and M(x) = x (x^2-p^2)(x^2-q^2),
//   row i of B^T: the coefficients of M(x) / (x - a_i);  row i of G: (1, a_i, a_i^2) / M'(a_i);  column i of A^T: a_i^k
// They lose fewer bits than the usual 0, +-1, +-2: the transforms' entries are closer to one another in size.
//
// Chosen when the accuracy setting allows it and the tiles are well filled.
#include "gemm_passes.h"

namespace convext::CONVEXT_ISA {
namespace {

using V = Vec<float>;
constexpr int kPositions = 36;
constexpr int kLanes = kMaxVectors * V::width;
constexpr float kP = 0.75f, kQ = 1.5f;
constexpr int64_t kBlockBytes = 768 << 10;    // V of a block, about the second-level cache
constexpr int32_t kMinTiles = 24, kMaxTiles = 48;
constexpr int32_t kPartDepth = 32768 / (kLanes * 4);  // of U: stays in the first-level cache
constexpr int64_t kItems = 16;

// B^T d for one column of six.
CONVEXT_INLINE void transform_input(V (&d)[6]) {
  const V p(kP), q(kQ), p2(kP * kP), q2(kQ * kQ), sum(kP * kP + kQ * kQ), product(kP * kP * kQ * kQ);
  const V even_p = d[4] - q2 * d[2], odd_p = p * (d[3] - q2 * d[1]);
  const V even_q = d[4] - p2 * d[2], odd_q = q * (d[3] - p2 * d[1]);
  d[0] = (d[4] - sum * d[2]) + product * d[0];
  d[5] = (d[5] - sum * d[3]) + product * d[1];
  d[1] = even_p + odd_p, d[2] = even_p - odd_p;
  d[3] = even_q + odd_q, d[4] = even_q - odd_q;
}

// A^T m for one column of six.
CONVEXT_INLINE void transform_output(const V (&m)[6], V (&y)[4]) {
  const V p(kP), q(kQ), p2(kP * kP), q2(kQ * kQ), p3(kP * kP * kP), q3(kQ * kQ * kQ);
  const V sum_p = m[1] + m[2], difference_p = m[1] - m[2], sum_q = m[3] + m[4], difference_q = m[3] - m[4];
  y[0] = m[0] + (sum_p + sum_q);
  y[1] = p * difference_p + q * difference_q;
  y[2] = p2 * sum_p + q2 * sum_q;
  y[3] = (p3 * difference_p + q3 * difference_q) + m[5];
}

// G g for one column of three; in float64, once for each weight.
void transform_filter(const double (&g)[3], double (&u)[6]) {
  const double p2 = double{kP} * kP, q2 = double{kQ} * kQ;
  const double np = 2 * p2 * (p2 - q2), nq = 2 * q2 * (q2 - p2);
  u[0] = g[0] / (p2 * q2);
  u[1] = (g[0] + kP * g[1] + p2 * g[2]) / np;
  u[2] = (g[0] - kP * g[1] + p2 * g[2]) / np;
  u[3] = (g[0] + kQ * g[1] + q2 * g[2]) / nq;
  u[4] = (g[0] - kQ * g[1] + q2 * g[2]) / nq;
  u[5] = g[2];
}

struct Plan {
  int32_t tile_rows, tile_columns;  // of one image
  int64_t tiles;
  int64_t blocks;
  int64_t block_tiles;              // at most
  int32_t pitch;                    // of V: C in whole vectors
  Panels<float> split;
  int32_t panel_runs;

  explicit Plan(const ConvProblem& p) : split(p.k) {
    tile_rows = (p.p() + 3) / 4, tile_columns = (p.q() + 3) / 4;
    tiles = int64_t{p.n} * tile_rows * tile_columns;
    pitch = (p.c + V::width - 1) / V::width * V::width;
    int64_t size = kBlockBytes / (int64_t{kPositions} * (pitch > 0 ? pitch : 1) * 4);
    size = size < kMinTiles ? kMinTiles : size > kMaxTiles ? kMaxTiles : size;
    blocks = (tiles + size - 1) / size;
    block_tiles = blocks > 0 ? (tiles + blocks - 1) / blocks : 0;
    const int64_t runs = blocks > 0 ? (kItems + blocks - 1) / blocks : 1;
    panel_runs = static_cast<int32_t>(runs < split.count ? runs : split.count);
  }
  int64_t block_begin(int64_t block) const { return tiles * block / blocks; }
  int32_t run_begin(int64_t run) const { return static_cast<int32_t>(split.count * run / panel_runs); }

  // The workspace: a row of zeros, then V and M for each thread.
  int64_t zeros_bytes() const { return align64(int64_t{pitch} * 4); }
  int64_t v_elements() const { return kPositions * block_tiles * pitch; }
  int64_t m_elements() const { return kPositions * block_tiles * kLanes; }
  int64_t slot_bytes() const { return align64((v_elements() + m_elements()) * 4); }
};

struct Tile {
  int64_t n;
  int32_t p, q;  // first output
};

CONVEXT_INLINE Tile tile_at(const Plan& plan, int64_t index) {
  return {index / plan.tile_columns / plan.tile_rows,
          static_cast<int32_t>(index / plan.tile_columns % plan.tile_rows) * 4,
          static_cast<int32_t>(index % plan.tile_columns) * 4};
}

// V of one tile: position i*6+j goes to v + (i*6+j) * position_pitch.
void gather_tile(const ConvProblem& p, const float* x, const float* zeros, Tile tile, float* v,
                 int64_t position_pitch) {
  const float* patch[6][6];
  for (int i = 0; i < 6; ++i) {
    for (int j = 0; j < 6; ++j) {
      const int32_t h = tile.p - p.pad_h + i, w = tile.q - p.pad_w + j;
      const bool inside = h >= 0 && h < p.h && w >= 0 && w < p.w;
      patch[i][j] = inside ? x + ((tile.n * p.h + h) * p.w + w) * p.c : zeros;
    }
  }
  for (int32_t c = 0; c < p.c; c += V::width) {
    const Lanes<float> lanes(p.c - c);
    V rows[6][6];  // [column of B^T d B][row of d]
    CONVEXT_UNROLL
    for (int i = 0; i < 6; ++i) {
      V d[6];
      CONVEXT_UNROLL
      for (int j = 0; j < 6; ++j) d[j] = load(patch[i][j] + c, lanes);
      transform_input(d);
      CONVEXT_UNROLL
      for (int j = 0; j < 6; ++j) rows[j][i] = d[j];
    }
    CONVEXT_UNROLL
    for (int j = 0; j < 6; ++j) {
      transform_input(rows[j]);
      CONVEXT_UNROLL
      for (int i = 0; i < 6; ++i) store(v + (i * 6 + j) * position_pitch + c, rows[j][i]);
    }
  }
}

// M = V U for one panel and all positions.
void multiply(const Plan& plan, int32_t depth, const float* v, const float* u, int32_t tiles, int32_t vectors,
              float* m) {
  const int32_t lanes = vectors * V::width, most = max_rows(vectors), pieces = (tiles + most - 1) / most;
  const int32_t parts = depth > kPartDepth ? (depth + kPartDepth - 1) / kPartDepth : 1;
  static constexpr int32_t kTap[1] = {0};
  const float* rows[kMaxTiles];
  float* out[kMaxTiles];
  TileArgs<float> args{};
  args.taps = args.b_taps = kTap;
  args.num_taps = 1;
  args.columns = lanes;
  for (int position = 0; position < kPositions; ++position) {
    for (int32_t t = 0; t < tiles; ++t) {
      rows[t] = v + (int64_t{position} * plan.block_tiles + t) * plan.pitch;
      out[t] = m + (int64_t{position} * plan.block_tiles + t) * kLanes;
    }
    for (int32_t part = 0; part < parts; ++part) {
      const int32_t begin = depth * part / parts;
      args.depth = depth * (part + 1) / parts - begin;
      args.a_offset = begin;
      args.b = u + (int64_t{position} * depth + begin) * lanes;
      args.accumulate = part > 0;
      for (int32_t i = 0; i < pieces; ++i) {
        const int32_t first = tiles * i / pieces, last = tiles * (i + 1) / pieces;
        args.rows = rows + first;
        args.out = out + first;
        tile_kernel<float>(last - first, vectors)(args);
      }
    }
  }
}

// y of one tile and one panel: A^T M A, the epilogue, the part of the tile that lies inside y.
template <class F>
CONVEXT_INLINE void scatter_tile(const ConvProblem& p, const LaunchArgs& args, Tile tile, const float* m,
                                 int64_t position_pitch, int32_t first_column, int32_t columns, F activation) {
  const Epilogue& epilogue = args.epilogue;
  const float* scales = static_cast<const float*>(epilogue.scale);
  const float* shifts = static_cast<const float*>(epilogue.shift);
  const float* residual = static_cast<const float*>(epilogue.residual);
  const int32_t height = p.p() - tile.p < 4 ? p.p() - tile.p : 4, width = p.q() - tile.q < 4 ? p.q() - tile.q : 4;
  for (int32_t j = 0; j < columns; j += V::width) {
    const Lanes<float> lanes(columns - j);
    V half[4][6];  // A^T M
    CONVEXT_UNROLL
    for (int b = 0; b < 6; ++b) {
      V column[6], y[4];
      CONVEXT_UNROLL
      for (int a = 0; a < 6; ++a) column[a] = load(m + (a * 6 + b) * position_pitch + j);
      transform_output(column, y);
      CONVEXT_UNROLL
      for (int a = 0; a < 4; ++a) half[a][b] = y[a];
    }
    const V scale = scales ? load(scales + first_column + j, lanes) : V(1.0f);
    const V shift = shifts ? load(shifts + first_column + j, lanes) : V::zero();
    for (int32_t a = 0; a < height; ++a) {
      V y[4];
      transform_output(half[a], y);
      const int64_t at = ((tile.n * p.p() + tile.p + a) * p.q() + tile.q) * p.k + first_column + j;
      CONVEXT_UNROLL
      for (int b = 0; b < 4; ++b) {
        if (b >= width) break;
        V value = y[b] * scale + shift;
        if (residual) value += load(residual + at + int64_t{b} * p.k, lanes);
        store(static_cast<float*>(args.out) + at + int64_t{b} * p.k, activation.forward(value), lanes);
      }
    }
  }
}

void run_item(const ConvProblem& p, const Plan& plan, const LaunchArgs& args, int64_t item, float* v, float* m) {
  const int64_t block = item % plan.blocks, run = item / plan.blocks;
  const int64_t begin = plan.block_begin(block);
  const int32_t tiles = static_cast<int32_t>(plan.block_begin(block + 1) - begin);
  const float* zeros = static_cast<const float*>(args.workspace);
  for (int32_t t = 0; t < tiles; ++t) {
    gather_tile(p, static_cast<const float*>(args.a), zeros, tile_at(plan, begin + t), v + int64_t{t} * plan.pitch,
                plan.block_tiles * plan.pitch);
  }
  for (int32_t panel = plan.run_begin(run); panel < plan.run_begin(run + 1); ++panel) {
    const float* u = static_cast<const float*>(args.b) +
                     int64_t{kPositions} * p.c * plan.split.begin(panel) * V::width;
    multiply(plan, p.c, v, u, tiles, plan.split.width(panel), m);
    visit_activation<V>(args.epilogue.activation, [&](auto f) {
      for (int32_t t = 0; t < tiles; ++t) {
        scatter_tile(p, args, tile_at(plan, begin + t), m + int64_t{t} * kLanes, plan.block_tiles * kLanes,
                     plan.split.first_column(panel), plan.split.num_columns(panel), f);
      }
    });
  }
}

struct WinogradFprop {
  static const char* pack_format(const ConvProblem&) { return "winograd_f4x4_f32_" CONVEXT_STRING(CONVEXT_ISA); }

  static int64_t packed_size(const ConvProblem& p) {
    return packed_elements<float>(1, kPositions, p.c, p.k) * int64_t{sizeof(float)};
  }

  static void pack(const ConvProblem& p, const void* w, void* packed, const Parallel& parallel) {
    if (p.k == 0) return;
    const Panels<float> split(p.k);
    parallel.for_each(split.count, [&](int64_t index) {
      const int32_t panel = static_cast<int32_t>(index), lanes = split.width(panel) * V::width;
      float* u = static_cast<float*>(packed) + int64_t{kPositions} * p.c * split.begin(panel) * V::width;
      for (int32_t c = 0; c < p.c; ++c) {
        for (int32_t lane = 0; lane < lanes; ++lane) {
          const int32_t k = split.first_column(panel) + lane;
          double rows[3][6] = {}, filter[6][6] = {};
          if (k < p.k) {
            const float* g = static_cast<const float*>(w) + (int64_t{k} * p.c + c) * 9;
            for (int i = 0; i < 3; ++i) transform_filter({g[i * 3], g[i * 3 + 1], g[i * 3 + 2]}, rows[i]);
            for (int j = 0; j < 6; ++j) transform_filter({rows[0][j], rows[1][j], rows[2][j]}, filter[j]);
          }
          for (int i = 0; i < 6; ++i) {
            for (int j = 0; j < 6; ++j) {
              u[((i * 6 + j) * int64_t{p.c} + c) * lanes + lane] = static_cast<float>(filter[j][i]);
            }
          }
        }
      }
    });
  }

  static int64_t workspace(const ConvProblem& p, int32_t threads) {
    const Plan plan(p);
    return plan.zeros_bytes() + (threads > 1 ? threads : 1) * plan.slot_bytes();
  }

  static const char* launch(const ConvProblem& p, const LaunchArgs& args) {
    const Plan plan(p);
    if (plan.tiles == 0 || p.k == 0) return nullptr;
    clear_zeros<float>(args.workspace, plan.pitch);
    const int64_t items = plan.blocks * plan.panel_runs;
    const int64_t slots = args.parallel->threads > 1 ? args.parallel->threads : 1;
    char* scratch = static_cast<char*>(args.workspace) + plan.zeros_bytes();
    args.parallel->for_each(slots, [&](int64_t slot) {
      float* v = reinterpret_cast<float*>(scratch + slot * plan.slot_bytes());
      const int64_t end = items * (slot + 1) / slots;
      for (int64_t item = items * slot / slots; item < end; ++item) {
        run_item(p, plan, args, item, v, v + plan.v_elements());
      }
    });
    return nullptr;
  }
};

const char* reject_unsuited(const ConvProblem& p) {
  if (p.r != 3 || p.s != 3) return "Winograd F(4x4, 3x3) needs a 3x3 filter";
  if (!p.is_unit_stride()) return "Winograd needs stride 1";
  if (p.is_dilated()) return "Winograd needs a filter without dilation";
  if (p.groups != 1) return "Winograd needs groups = 1";
  if (p.p() <= 0 || p.q() <= 0) return "the output is empty";
  return nullptr;
}

}  // namespace
}  // namespace convext::CONVEXT_ISA

namespace convext {
extern const Variant CONVEXT_VARIANT(fprop_winograd_f32) =
    CONVEXT_ISA::packed_variant<float, CONVEXT_ISA::WinogradFprop>(
        CONVEXT_VARIANT_NAME(fprop_winograd_f32), "winograd", Pass::kFprop, CONVEXT_ISA::reject_unsuited);
}  // namespace convext
