// Convolution of a first layer, gradient of the filters, on the tensor cores: dw[k,r,s,c] = sum_{n,p,q} dy[n,p,q,k] *
// x[n,h,w,c] of 1 to 4 channels.
//
//   A (BLOCK_M filters, 16 pixels) = dy, M-major; B (16 pixels, taps x channels) out of the patch; C = dw
//   grid: x = split of the tiles of pixels; y = tile of filters; z = tile of taps
//
//   for each tile    dy by cp.async and the patch (stem.h), then a step for each of its 8 rows of 16 pixels
//   at the end       the block's fp32 slab of dw; reduce_splits adds the slabs in a fixed order
//
// Eight taps are a group: a lane reads one of them for its pixels, 8 bytes a load, and pairs what two neighbouring
// pixels have of each channel. The columns of B are then channel by channel the group's eight taps, so that of three
// channels a fourth costs nothing but room. All warps have all filters; the groups are dealt out to them in turn.
// Pixels past the edge of y are zeros in both operands: dy's zero times an infinite x would be NaN.
//
// Budget at 7x7, 64 filters, bf16: 16 KiB of dy, 21 rows of patch at 360 bytes = 24 KiB; 2 groups * 3 channels * 4 * 4
// = 96 registers of accumulators, 168 in all: 3 blocks, 12 warps. A step reads 16 KiB of shared memory for 64*192*16
// products, 128 cycles beside 155 of the tensor cores. Bytes: dy and x once through memory, half of x again from L2,
// and 8 a weight and split; as many FLOP as forward, 2*147*64 a pixel of dy.
//
// @sass stem_wgrad<WgradTile<float, 64, .*   shared=46544 warps=8 per_mma=7.6
// @sass stem_wgrad<WgradTile<float, 32, .*   shared=30160 warps=12 per_mma=8.2
// @sass stem_wgrad<WgradTile<.*, 64, .*      shared=23944 warps=12 per_mma=5.6
// @sass stem_wgrad<WgradTile<.*, 32, .*      shared=15752 warps=16 per_mma=9.5
#include "cuda/tile/reduce_splits.h"
#include "stem.h"

namespace convext::cuda {
namespace {

// N: columns, GROUPS * CHANNELS * 8 for each of the warps. ROW_BYTES: of a row of pixels, the reduction of a step.
template <class T_, int M, int N, int WARPS_M_, int WARPS_N_, int STAGES_, int BLOCKS_, int ROW_BYTES_, int CHANNELS_>
struct WgradTile {
  using T = T_;
  static constexpr int BLOCK_M = M, WARP_M = M, BLOCK_N = N, WARP_N = N / WARPS_N_;
  static constexpr int BLOCKS = BLOCKS_, CHANNELS = CHANNELS_;
  static constexpr int GROUPS = N / (WARPS_N_ * 8 * CHANNELS), TAPS = GROUPS * WARPS_N_ * 8;  // of a warp; of a block
  static constexpr int MMA_M = M / 16;
  static constexpr int CHUNK = 16 / sizeof(T), CHUNKS = M / CHUNK;  // of dy
  static constexpr int MMAS = ROW_BYTES_ / 32;                      // for a row of pixels
  static constexpr int PIXELS = sizeof(T) == 2 ? 4 : 2;             // of a lane in one of those
  static constexpr int DY_BYTES = kStemPixels * M * sizeof(T);
  static_assert(WARPS_M_ * WARPS_N_ * 32 == kStemThreads && WARPS_M_ == 1 && GROUPS * WARPS_N_ * 8 * CHANNELS == N);
  static_assert(ROW_BYTES_ == kStemCols * sizeof(T));
};
template <class T, int M, int GROUPS, int CHANNELS, int BLOCKS>
using WgradTileOf = WgradTile<T, M, GROUPS * CHANNELS * 32, 1, 4, 1, BLOCKS, 16 * sizeof(T), CHANNELS>;

// Brings dy of a tile into shared memory, M-major: zeros past the edge of y and past the last filter. `vector`: the
// filters of a pixel come in whole chunks of 16 bytes.
template <class TILE>
CONVEXT_DEVICE void load_dy(const ConvProblem& problem, const StemPlan& plan, const StemTileAt& at,
                            const Strides& strides, const typename TILE::T* dy, bool vector, int32_t m0, uint32_t to) {
  using T = typename TILE::T;
  constexpr int CHUNKS = TILE::CHUNKS, AT_ONCE = kStemThreads / CHUNKS;  // pixels
  const int chunk = threadIdx.x % CHUNKS, first = threadIdx.x / CHUNKS;
  const int32_t filter = m0 + chunk * TILE::CHUNK;
  const auto each = [&](auto&& copy) {
#pragma unroll 4  // with more of them at once registers spill on sm_80
    for (int pixel = 0; pixel < kStemPixels; pixel += AT_ONCE) {
      const int row = (pixel + first) / kStemCols, col = (pixel + first) % kStemCols;
      const bool inside = at.p + row < plan.p && at.q + col < plan.q && filter < problem.k;
      const int64_t offset =
          at.n * strides.n + (at.p + row) * strides.h + (at.q + col) * strides.w + filter * strides.c;
      copy(to + mn_major_offset<T, TILE::BLOCK_M>(pixel + first, chunk), dy + (inside ? offset : 0), inside);
    }
  };
  if (vector) {
    each([&](uint32_t there, const T* from, bool inside) { ptx::cp_async_16(there, from, inside); });
  } else {
    each([&](uint32_t there, const T* from, bool inside) {
      Vector<T> v;
#pragma unroll
      for (int e = 0; e < TILE::CHUNK; ++e) {
        v.v[e] = inside && filter + e < problem.k ? __ldg(from + e * strides.c) : from_accumulate<T>(0);
      }
      store_chunk(there, v);
    });
  }
}

// B's fragment for channel `c` of the taps, of the lane's pixels in the order of the fragment's rows.
template <class T, int PIXELS>
CONVEXT_DEVICE void fragment_of(const StemPixel<T> (&pixels)[PIXELS], int c, uint32_t (&b)[2]) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t first = pixels[i * 2].words[c / 2], second = pixels[i * 2 + 1].words[c / 2];
      b[i] = c % 2 ? first >> 16 | (second & 0xFFFF0000u) : (first & 0xFFFFu) | second << 16;
    }
  } else {
    b[0] = pixels[0].words[c], b[1] = pixels[1].words[c];
  }
}

template <class TILE>
__global__ void __launch_bounds__(kStemThreads, TILE::BLOCKS)
    stem_wgrad(ConvProblem problem, StemPlan plan, Strides y_strides, Strides x_strides,
               const typename TILE::T* __restrict__ dy, const typename TILE::T* __restrict__ x,
               float* __restrict__ partial, bool vector) {
  using T = typename TILE::T;
  constexpr int BYTES = StemPixel<T>::BYTES, GROUPS = TILE::GROUPS, CHANNELS = TILE::CHANNELS, PIXELS = TILE::PIXELS;
  CONVEXT_SHARED_MEMORY(shared);
  const uint32_t dy_tile = keep(ptx::shared_address(shared)), patch = dy_tile + TILE::DY_BYTES;
  const int32_t m0 = static_cast<int32_t>(blockIdx.y) * TILE::BLOCK_M;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Fragments<TILE, true, false> a_lane(0);

  const int32_t first_tap = static_cast<int32_t>(blockIdx.z) * TILE::TAPS + warp * 8;  // of the warp's first group
  uint32_t tap_at[GROUPS];
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
    int32_t r, s;  // a lane past the last tap reads that one, into columns that nobody stores
    plan.by_filter_row(static_cast<uint32_t>(min_of(first_tap + group * 32 + lane / 4, plan.taps - 1)), r, s);
    tap_at[group] = keep(r * problem.dil_h * plan.pitch + s * problem.dil_w * BYTES);
  }
  const bool busy = first_tap < plan.taps;
  // The column of the tile that pixel i of mma m is in.
  const auto column = [&](int m, int i) {
    return sizeof(T) == 2 ? lane % 4 * 2 + i % 2 + i / 2 * 8 : lane % 4 + i * 4 + m * 8;
  };

  float acc[GROUPS][CHANNELS][TILE::MMA_M][4] = {};
#pragma unroll 1
  for (int32_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    const StemTileAt at(plan, tile);
    load_dy<TILE>(problem, plan, at, y_strides, dy, vector, m0, dy_tile);
    load_patch(problem, plan, x_strides, x, at, patch);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();  // dy and the patch are whole
    const int32_t rows = busy ? min_of(kStemRows, plan.p - at.p) : 0;
    uint32_t row_at = patch + plan.shift * BYTES;
#pragma unroll 1
    for (int32_t row = 0; row < rows; ++row) {
#pragma unroll
      for (int m = 0; m < TILE::MMAS; ++m) {
        uint32_t a[TILE::MMA_M][4];
#pragma unroll
        for (int i = 0; i < TILE::MMA_M; ++i) {
          a_lane.load(a[i], dy_tile + row * kStemCols * TILE::BLOCK_M * static_cast<int>(sizeof(T)), i, m);
        }
#pragma unroll
        for (int group = 0; group < GROUPS; ++group) {
          if (group > 0 && first_tap + group * 32 >= plan.taps) continue;
          StemPixel<T> pixels[PIXELS] = {};
#pragma unroll
          for (int i = 0; i < PIXELS; ++i) {
            if (at.q + column(m, i) < plan.q) {
              pixels[i] = load_pixel<T>(row_at + tap_at[group] + column(m, i) * problem.stride_w * BYTES);
            }
          }
#pragma unroll
          for (int c = 0; c < CHANNELS; ++c) {
            uint32_t b[2];
            fragment_of<T>(pixels, c, b);
#pragma unroll
            for (int i = 0; i < TILE::MMA_M; ++i) ptx::mma<T>(acc[group][c][i], a[i], b);
          }
        }
      }
      row_at += problem.stride_h * plan.pitch;
    }
    __syncthreads();  // all have read dy and the patch before the next ones take their place
  }

  const int64_t columns = int64_t{plan.taps} * problem.c;
  float* slab = partial + int64_t{blockIdx.x} * problem.k * columns;
#pragma unroll
  for (int i = 0; i < TILE::MMA_M * 4; ++i) {
    const int32_t k = m0 + i / 4 * 16 + lane / 4 + i % 4 / 2 * 8;
    if (k >= problem.k) continue;
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
      const int32_t tap = first_tap + group * 32 + lane % 4 * 2 + i % 2;
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        if (tap < plan.taps && c < problem.c) slab[k * columns + tap * problem.c + c] = acc[group][c][i / 4][i % 4];
      }
    }
  }
}

template <class TILE>
struct WgradPlan {
  StemPlan stem;
  int64_t m_tiles, n_tiles, splits;
  explicit WgradPlan(const ConvProblem& p)
      : stem(p, StemPixel<typename TILE::T>::BYTES, 32 / StemPixel<typename TILE::T>::BYTES),
        m_tiles(ceil_div(p.k, TILE::BLOCK_M)),
        n_tiles(ceil_div(stem.taps, TILE::TAPS)) {
    constexpr int64_t kLeastTiles = 4;  // of a split: it writes and reads a slab
    const int64_t wanted = ceil_div(kProcessors * TILE::BLOCKS, m_tiles * n_tiles);
    splits = std::min(wanted, ceil_div(stem.tiles, kLeastTiles));
  }
};

template <class TILE>
int64_t workspace(const ConvProblem& p, int32_t) {
  return WgradPlan<TILE>(p).splits * p.w_size() * static_cast<int64_t>(sizeof(float));
}

template <class TILE>
const char* reject(const ConvProblem& p) {
  if (const char* why = reject_stem(p)) return why;
  if (TILE::CHANNELS == 4 ? p.c < 4 : p.c > TILE::CHANNELS) return "its tile is for other channels";
  if (double(p.r) * p.s > 1 << 20) return "the filter has more than 2^20 taps";
  if (StemPlan::most_patch_bytes(p, StemPixel<typename TILE::T>::BYTES) + TILE::DY_BYTES > kMostStemShared) {
    return "dy and patch do not fit into shared memory";
  }
  if (ceil_div(p.k, TILE::BLOCK_M) > 65535 || ceil_div(p.taps(), TILE::TAPS) > 65535) return "the filters are too many";
  return nullptr;
}

template <class TILE>
const char* launch(const ConvProblem& p, const LaunchArgs& args) {
  using T = typename TILE::T;
  const WgradPlan<TILE> plan(p);
  const dim3 grid(static_cast<unsigned>(plan.splits), static_cast<unsigned>(plan.m_tiles),
                  static_cast<unsigned>(plan.n_tiles));
  const bool vector = p.y_layout == Layout::kNHWC && p.k % TILE::CHUNK == 0;
  if (const char* error = launch_kernel(stem_wgrad<TILE>, grid, dim3(kStemThreads), TILE::DY_BYTES + plan.stem.bytes,
                                        args.stream, p, plan.stem, strides_of(p.y_layout, p.k, p.p(), p.q()),
                                        strides_of(p.x_layout, p.c, p.h, p.w), static_cast<const T*>(args.a),
                                        static_cast<const T*>(args.b), static_cast<float*>(args.workspace), vector)) {
    return error;
  }
  return launch_reduce_splits<T>(args.workspace, args.out, p.w_size(), static_cast<int32_t>(plan.splits), args.stream);
}

template <class TILE>
constexpr Variant variant_of(const char* name) {
  using T = typename TILE::T;
  Variant v = cuda_variant<T>(name, Algorithm::stem, Pass::kWgrad, Layouts::kAny, DTypeOf<T>::on_tensor_cores);
  v.pack_format = krsc_format;
  v.reject = reject<TILE>;
  v.workspace = workspace<TILE>;
  v.cost = stem_cost;
  v.gathers = true;
  v.launch = launch<TILE>;
  v.block_m = TILE::BLOCK_M, v.block_n = TILE::BLOCK_N, v.block_k = kStemCols;
  return v;
}

}  // namespace
}  // namespace convext::cuda

namespace convext {

#define CONVEXT_STEM(T, dtype, m, n, groups, channels, blocks)                                               \
  extern const Variant wgrad_stem_##dtype##_##m##x##n##x16_sm80 =                                            \
      cuda::variant_of<cuda::WgradTileOf<T, m, groups, channels, blocks>>("wgrad_stem_" #dtype "_" #m "x" #n \
                                                                          "x16_sm80");
#define CONVEXT_STEM_TILES(T, dtype)       \
  CONVEXT_STEM(T, dtype, 64, 192, 2, 3, 3) \
  CONVEXT_STEM(T, dtype, 32, 192, 2, 3, 4) \
  CONVEXT_STEM(T, dtype, 64, 128, 1, 4, 3)
CONVEXT_STEM_TILES(cuda::bf16, bf16)
CONVEXT_STEM_TILES(cuda::fp16, f16)
CONVEXT_STEM(float, tf32, 64, 192, 2, 3, 2)
CONVEXT_STEM(float, tf32, 32, 192, 2, 3, 3)
CONVEXT_STEM(float, tf32, 64, 128, 1, 4, 3)

}  // namespace convext
