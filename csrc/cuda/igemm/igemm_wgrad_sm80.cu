// Direct convolution, gradient of the filters, on the tensor cores: dw[k,r,s,c] = sum_{n,p,q} dy[n,p,q,k] * x[n,h,w,c].
//
//   A (K, NPQ) = dy, M-major; B (NPQ, RSC) = im2col of x, N-major; C (K, RSC) = dw in KRSC order
//   grid: x = (tile of filters, tile of taps and channels); y = group; z = split of the NPQ pixels
//
// The reduction is long (NPQ) and the result small, so it is split over blocks: each writes an fp32 slab of its own,
// and reduce_splits adds the slabs in a fixed order. No atomics: results repeat to the bit. The number of splits aims
// at two blocks for each multiprocessor of the largest GPU and depends on the problem alone.
//
//   pixels     a thread's column of the B tile is one (r, s, c) for the whole loop; only the pixel moves
//     |        +-----+ dy (BLOCK_K, BLOCK_M)     +-----+ im2col(x) (BLOCK_K, BLOCK_N)
//     v        +-----+                           +-----+
//
// With dilation, stretches of BLOCK_K pixels whose every tap of the tile falls into the padding are skipped.
// Budget, by tile (igemm_tiles.h): 24 to 96 KiB of shared memory, 16 to 128 registers of accumulators; 64 FLOP for
// each byte that a block of 128x128 loads. Slabs cost splits*K*RSC*8 bytes of traffic, in L2 for all but the largest
// filters.
// `gather` collects elements one by one, for channels that are not whole 16-byte chunks and NCHW.
#include <type_traits>

#include "cuda/tile/gemm.h"
#include "cuda/tile/reduce_splits.h"
#include "igemm_pixels.h"
#include "igemm_tiles.h"

namespace convext::cuda {
namespace {

constexpr int64_t kTargetBlocks = 2 * kProcessors;

// What a launch divides by, worked out on the host.
struct WgradGeometry {
  PixelDecoder decode;
  FastDiv by_channels, by_width, by_n_tiles;  // channels of a group; columns of the filter

  WgradGeometry(const ConvProblem& p, int64_t n_tiles)
      : decode(p.p(), p.q()), by_channels(p.c_per_group()), by_width(p.s), by_n_tiles(n_tiles) {}

  // The tap and channel of a column of dw.
  CONVEXT_DEVICE void tap_of(int32_t column, int32_t& r, int32_t& s, int32_t& c) const {
    int32_t tap;
    by_channels(static_cast<uint32_t>(column), tap, c);
    by_width(static_cast<uint32_t>(tap), r, s);
  }
};

// Which stretches of pixels meet the image through some tap of a tile's columns: all, where no tap reaches far.
struct PixelSkip {
  bool may_skip;
  int32_t h_first, h_last, w_first, w_last;  // of the tile's first tap and its last
  bool one_row;                              // those are in one row of the filter

  CONVEXT_DEVICE PixelSkip(const ConvProblem& p, const WgradGeometry& g, int32_t first_column, int32_t last_column)
      : may_skip(p.is_dilated()) {
    if (!may_skip) return;
    int32_t r_first, s_first, r_last, s_last, unused;
    g.tap_of(first_column, r_first, s_first, unused);
    g.tap_of(last_column, r_last, s_last, unused);
    h_first = p.h_of(0, r_first), h_last = p.h_of(0, r_last);
    w_first = p.w_of(0, s_first), w_last = p.w_of(0, s_last);
    one_row = r_first == r_last;
  }
  CONVEXT_DEVICE bool meets(const ConvProblem& p, const WgradGeometry& g, int32_t begin, int32_t last) const {
    int32_t n_first, p_first, q_first, n_last, p_last, q_last;
    g.decode(begin, n_first, p_first, q_first);
    g.decode(last, n_last, p_last, q_last);
    if (n_first != n_last) return true;
    if (h_last + p_last * p.stride_h < 0 || h_first + p_first * p.stride_h >= p.h) return false;
    if (p_first != p_last || !one_row) return true;
    return w_last + q_last * p.stride_w >= 0 && w_first + q_first * p.stride_w < p.w;
  }
  // The first stretch of `length` pixels from m on that meets the image.
  CONVEXT_DEVICE int32_t next(const ConvProblem& p, const WgradGeometry& g, int32_t m, int32_t end,
                              int32_t length) const {
    if (may_skip) {
      while (m < end && !meets(p, g, m, (end - m > length ? m + length : end) - 1)) m += length;
    }
    return m;
  }
};

// Brings dy and im2col(x) of BLOCK_K pixels into shared memory, 16 bytes a copy. A thread has one of the pixels, and of
// each operand some chunks SHARE apart, so that it finds its pixel's place once for all of them. A chunk of x is one
// tap and 16 bytes of its channels for the whole loop: a distance from the pixel, and the tap's row and column.
template <class TILE>
struct WgradVectorLoader {
  using T = typename TILE::T;
  static constexpr int CHUNK = TILE::CHUNK, BLOCK_K = TILE::BLOCK_K, SHARE = TILE::THREADS / BLOCK_K;
  static constexpr int A_COPIES = TILE::BLOCK_M / CHUNK / SHARE, B_COPIES = TILE::BLOCK_N / CHUNK / SHARE;
  static_assert(TILE::THREADS % BLOCK_K == 0 && A_COPIES >= 1 && B_COPIES >= 1);

  int32_t line, a_count;
  uint32_t a_to, b_to;
  uintptr_t dy, x;
  int32_t b_offset[B_COPIES];  // of the tap and channel, in chunks
  int32_t b_h[B_COPIES],
      b_w[B_COPIES];  // of the tap, where pixel (0, 0) of y meets it; never inside past the last column

  CONVEXT_DEVICE WgradVectorLoader(const ConvProblem& p, const WgradGeometry& g, const Strides&, const Strides& xs,
                                   const T* dy_, const T* x_, int32_t m0, int32_t n0, int32_t columns) {
    const int32_t tid = threadIdx.x, share = tid % SHARE, cg = p.c / p.groups, kg = p.k / p.groups, group = blockIdx.y;
    line = tid / SHARE;
    const int32_t filter = m0 + share * CHUNK, left = kg - filter;
    a_count = left <= 0 ? 0 : (left + SHARE * CHUNK - 1) / (SHARE * CHUNK);
    dy = reinterpret_cast<uintptr_t>(dy_ + int64_t{group} * kg + filter);
    x = reinterpret_cast<uintptr_t>(x_ + int64_t{group} * cg);
#pragma unroll
    for (int j = 0; j < B_COPIES; ++j) {
      const int32_t column = n0 + (share + j * SHARE) * CHUNK;
      int32_t r = 0, s = 0, c = 0;
      if (column < columns) g.tap_of(column, r, s, c);
      const int32_t h = p.h_of(0, r);
      b_w[j] = p.w_of(0, s);
      b_offset[j] = h * static_cast<int32_t>(xs.h / CHUNK) + b_w[j] * static_cast<int32_t>(xs.w / CHUNK) + c / CHUNK;
      b_h[j] = column < columns ? h : INT32_MIN / 2;
    }
    a_to = keep(mn_major_offset<T, TILE::BLOCK_M>(line, share));
    b_to = keep(TILE::A_BYTES + mn_major_offset<T, TILE::BLOCK_N>(line, share));
  }

  // Where copy j of a thread goes: the swizzle turns the low bits of its distance from the first.
  template <int ROWS>
  static CONVEXT_DEVICE uint32_t to(uint32_t first, int j) {
    constexpr int TURNED = ROWS * sizeof(T) >= 128 ? 127 : 63;
    return (first ^ (j * SHARE * 16 & TURNED)) + (j * SHARE * 16 & ~TURNED);
  }

  CONVEXT_DEVICE void load_stage(const ConvProblem& p, const WgradGeometry& g, const Strides& xs, uint32_t stage,
                                 int32_t first, int32_t end) const {
    const int32_t m = first + line;
    const bool inside = m < end;
    const auto* from = reinterpret_cast<const unsigned char*>(
        dy + static_cast<uintptr_t>(int64_t{m} * (p.k * static_cast<int32_t>(sizeof(T)))));
    const int32_t count = inside ? a_count : 0;
#pragma unroll
    for (int j = 0; j < A_COPIES; ++j) {
      ptx::cp_async_16(to<TILE::BLOCK_M>(stage + a_to, j), from + j * SHARE * 16, j < count);
    }
    int32_t n, row, column;
    g.decode(inside ? m : 0, n, row, column);
    const int32_t h = inside ? row * p.stride_h : INT32_MIN / 2, w = column * p.stride_w;
    const int64_t pixel =
        int64_t{n} * static_cast<int32_t>(xs.n / CHUNK) +
        (row * p.stride_h * static_cast<int32_t>(xs.h / CHUNK) + w * static_cast<int32_t>(xs.w / CHUNK));
    const uintptr_t at = x + static_cast<uintptr_t>(pixel * 16);
#pragma unroll
    for (int j = 0; j < B_COPIES; ++j) {
      // One comparison for both ends: what is negative is large.
      const bool meets = static_cast<uint32_t>(h + b_h[j]) < static_cast<uint32_t>(p.h) &&
                         static_cast<uint32_t>(w + b_w[j]) < static_cast<uint32_t>(p.w);
      ptx::cp_async_16(to<TILE::BLOCK_N>(stage + b_to, j),
                       reinterpret_cast<const void*>(at + static_cast<uintptr_t>(int64_t{b_offset[j]} * 16)), meets);
    }
  }
};

// The same element by element, from any strides. A thread's chunks are fixed columns; its pixels lie a fixed distance
// apart.
template <class TILE>
struct WgradGatherLoader {
  using T = typename TILE::T;
  static constexpr int CHUNK = TILE::CHUNK, BLOCK_K = TILE::BLOCK_K;
  static constexpr int A_CHUNKS = TILE::BLOCK_M / CHUNK, A_STRIDE = TILE::THREADS / A_CHUNKS;
  static constexpr int B_CHUNKS = TILE::BLOCK_N / CHUNK, B_STRIDE = TILE::THREADS / B_CHUNKS;
  static_assert(TILE::THREADS % A_CHUNKS == 0 && TILE::THREADS % B_CHUNKS == 0);

  const Strides y_strides, x_strides;
  const T *dy, *x;
  int32_t cg, kg, columns, group;  // columns: RSC of a group
  int a_chunk, a_row, b_chunk, b_row;
  int32_t filter, column, b_r, b_s, b_c;

  CONVEXT_DEVICE WgradGatherLoader(const ConvProblem& p, const WgradGeometry& g, const Strides& ys, const Strides& xs,
                                   const T* dy_, const T* x_, int32_t m0, int32_t n0, int32_t columns_)
      : y_strides(ys),
        x_strides(xs),
        dy(dy_),
        x(x_),
        cg(p.c / p.groups),
        kg(p.k / p.groups),
        columns(columns_),
        group(blockIdx.y) {
    const int tid = static_cast<int>(keep(threadIdx.x));
    a_chunk = tid % A_CHUNKS, a_row = tid / A_CHUNKS;
    b_chunk = tid % B_CHUNKS, b_row = tid / B_CHUNKS;
    filter = m0 + a_chunk * CHUNK, column = n0 + b_chunk * CHUNK;
    g.tap_of(column, b_r, b_s, b_c);
  }

  CONVEXT_DEVICE void load_dy(const WgradGeometry& g, uint32_t destination, int32_t m, int32_t end) const {
    int32_t n, p, q;
    g.decode(m < end ? m : 0, n, p, q);
    const int64_t pixel = n * y_strides.n + p * y_strides.h + q * y_strides.w;
    Vector<T> chunk;
#pragma unroll
    for (int e = 0; e < CHUNK; ++e) {
      const bool inside = m < end && filter + e < kg;
      chunk.v[e] =
          inside ? __ldg(dy + pixel + (int64_t{group} * kg + filter + e) * y_strides.c) : from_accumulate<T>(0);
    }
    store_chunk(destination, chunk);
  }

  CONVEXT_DEVICE void load_x(const ConvProblem& problem, const WgradGeometry& g, uint32_t destination, int32_t m,
                             int32_t end) const {
    int32_t n, p, q;
    g.decode(m < end ? m : 0, n, p, q);
    Vector<T> chunk;
    int32_t r = b_r, s = b_s, c = b_c;
#pragma unroll
    for (int e = 0; e < CHUNK; ++e) {
      const int32_t h = problem.h_of(p, r), w = problem.w_of(q, s);
      const bool inside = column + e < columns && m < end && h >= 0 && h < problem.h && w >= 0 && w < problem.w;
      const int64_t at = n * x_strides.n + h * x_strides.h + w * x_strides.w + (int64_t{group} * cg + c) * x_strides.c;
      chunk.v[e] = inside ? __ldg(x + at) : from_accumulate<T>(0);
      if (++c == cg) {
        c = 0;
        if (++s == problem.s) s = 0, ++r;
      }
    }
    store_chunk(destination, chunk);
  }

  CONVEXT_DEVICE void load_stage(const ConvProblem& p, const WgradGeometry& g, const Strides&, uint32_t stage,
                                 int32_t first, int32_t end) const {
#pragma unroll
    for (int row = 0; row < BLOCK_K; row += A_STRIDE) {
      if (row + a_row >= BLOCK_K) break;
      load_dy(g, stage + mn_major_offset<T, TILE::BLOCK_M>(row + a_row, a_chunk), first + row + a_row, end);
    }
#pragma unroll
    for (int row = 0; row < BLOCK_K; row += B_STRIDE) {
      if (row + b_row >= BLOCK_K) break;
      load_x(p, g, stage + TILE::A_BYTES + mn_major_offset<T, TILE::BLOCK_N>(row + b_row, b_chunk), first + row + b_row,
             end);
    }
  }
};

// This warp's part of a slab, (kg, columns). PAIRS: the number of columns is even.
template <class TILE, bool PAIRS>
CONVEXT_DEVICE void store_partial(const float (&acc)[TILE::MMA_M][TILE::MMA_N][4], float* slab, int32_t k0, int32_t n0,
                                  int32_t kg, int32_t columns) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < TILE::MMA_M; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t k = k0 + i * 16 + lane / 4 + half * 8;
      if (k >= kg) continue;
      float* row = slab + int64_t{k} * columns;
#pragma unroll
      for (int j = 0; j < TILE::MMA_N; ++j) {
        const int32_t n = n0 + j * 8 + lane % 4 * 2;
        const float first = acc[i][j][half * 2], second = acc[i][j][half * 2 + 1];
        if constexpr (PAIRS) {
          if (n < columns) *reinterpret_cast<float2*>(row + n) = make_float2(first, second);
        } else {
          if (n < columns) row[n] = first;
          if (n + 1 < columns) row[n + 1] = second;
        }
      }
    }
  }
}

template <class TILE, bool VECTOR>
__global__ void __launch_bounds__(TILE::THREADS, TILE::BLOCKS)
    igemm_wgrad(ConvProblem problem, WgradGeometry geometry, Strides y_strides, Strides x_strides,
                int32_t pixels_per_split, int32_t npq, int32_t columns, const typename TILE::T* __restrict__ dy,
                const typename TILE::T* __restrict__ x, float* __restrict__ partial) {
  using Loader = std::conditional_t<VECTOR, WgradVectorLoader<TILE>, WgradGatherLoader<TILE>>;
  constexpr int BLOCK_K = TILE::BLOCK_K, STAGES = TILE::STAGES;
  CONVEXT_SHARED_MEMORY(shared);
  int32_t m_tile, n_tile;
  geometry.by_n_tiles(blockIdx.x, m_tile, n_tile);
  const int32_t m0 = m_tile * TILE::BLOCK_M, n0 = n_tile * TILE::BLOCK_N;
  const int32_t begin = static_cast<int32_t>(blockIdx.z) * pixels_per_split;
  const int32_t end = npq - begin > pixels_per_split ? begin + pixels_per_split : npq;
  const Loader loader(problem, geometry, y_strides, x_strides, dy, x, m0, n0, columns);
  const PixelSkip skip(problem, geometry, n0, min_of(n0 + TILE::BLOCK_N, columns) - 1);

  const uint32_t stages = keep(ptx::shared_address(shared));
  int32_t next = skip.next(problem, geometry, begin, end, BLOCK_K);
  const auto load_next = [&](uint32_t stage) {
    if (next < end) {
      loader.load_stage(problem, geometry, x_strides, stage, next, end);
      next = skip.next(problem, geometry, end - next > BLOCK_K ? next + BLOCK_K : end, end, BLOCK_K);
    }
  };
  int32_t loaded = 0;
#pragma unroll 1
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    loaded += next < end;
    load_next(stages + stage * TILE::STAGE_BYTES);
    ptx::cp_async_commit();
  }
  const int warp = threadIdx.x / 32;
  const Fragments<TILE, true, false> a_lane(warp / TILE::WARPS_N);
  const Fragments<TILE, false, false> b_lane(warp % TILE::WARPS_N);
  Ring<TILE> ring(stages);
  float acc[TILE::MMA_M][TILE::MMA_N][4] = {};
#pragma unroll 1
  for (int32_t step = 0; step < loaded; ++step) {
    ptx::cp_async_wait<STAGES - 2>();
    __syncthreads();  // the stage has landed for all threads, and all have read the one that is loaded next
    loaded += next < end;
    multiply_stage<TILE, TILE::AHEAD>(acc, a_lane, b_lane, ring.read, [&] { load_next(ring.load); });
    ptx::cp_async_commit();
    ring.advance();
  }
  const int32_t kg = problem.k / problem.groups;
  float* slab = partial + (int64_t{blockIdx.z} * problem.k + int64_t{blockIdx.y} * kg) * columns;
  store_partial<TILE, VECTOR>(acc, slab, m0 + warp / TILE::WARPS_N * TILE::WARP_M,
                              n0 + warp % TILE::WARPS_N * TILE::WARP_N, kg, columns);
}

struct WgradPlan {
  int64_t tiles, splits, pixels_per_split;
};
template <class TILE>
WgradPlan plan_of(const ConvProblem& p) {
  constexpr int64_t kLeastSteps = 16;  // fewer would not fill the pipeline
  const GemmShape g = p.gemm_shape(Pass::kWgrad);
  const int64_t tiles = ceil_div(g.m, TILE::BLOCK_M) * ceil_div(g.n, TILE::BLOCK_N);
  const int64_t wanted = ceil_div(kTargetBlocks, tiles * p.groups);
  const int64_t most = ceil_div(g.k, kLeastSteps * TILE::BLOCK_K);
  const int64_t steps = ceil_div(ceil_div(g.k, wanted < most ? wanted : most), TILE::BLOCK_K);
  return {tiles, ceil_div(g.k, steps * TILE::BLOCK_K), steps * TILE::BLOCK_K};
}

template <class TILE>
int64_t workspace(const ConvProblem& p, int32_t) {
  return plan_of<TILE>(p).splits * p.w_size() * static_cast<int64_t>(sizeof(float));
}

template <class TILE, bool VECTOR>
const char* reject(const ConvProblem& p) {
  if (VECTOR && (p.x_layout != Layout::kNHWC || p.y_layout != Layout::kNHWC)) {
    return "it takes channels-last tensors alone";
  }
  if (VECTOR && (p.c_per_group() % TILE::CHUNK || p.k_per_group() % TILE::CHUNK)) {
    return "the channels of a group are not a multiple of 16 bytes";
  }
  if (p.npq() > kMostPixels) return "there are more than 2^31 pixels";
  if (p.groups > 65535) return "there are more than 65535 groups";
  const int64_t far = int64_t{p.pad_h} + p.pad_w + int64_t{p.dil_h} * p.r + int64_t{p.dil_w} * p.s;
  if (far > INT32_MAX / 4) return "the padding or the dilated filter is too large";
  const double width = double(p.w) * p.c, image = (p.h + 2.0 * p.pad_h) * width + (p.w + 2.0 * p.pad_w) * p.c;
  if (VECTOR && std::max(image, double(p.h) * width) / TILE::CHUNK > INT32_MAX / 2) return "one image exceeds 16 GiB";
  if (VECTOR && int64_t{p.k} * 8 > INT32_MAX) return "one pixel of dy exceeds 2 GiB";
  if (int64_t{p.r} * p.s * p.c_per_group() > INT32_MAX / 2) return "one filter has more than 2^30 weights";
  return nullptr;
}

template <class TILE, bool VECTOR>
const char* launch(const ConvProblem& p, const LaunchArgs& args) {
  using T = typename TILE::T;
  const WgradPlan plan = plan_of<TILE>(p);
  if (plan.tiles > INT32_MAX) return "the grid would exceed 2^31 blocks";
  const int32_t columns = p.r * p.s * p.c_per_group();
  const dim3 grid(static_cast<unsigned>(plan.tiles), p.groups, static_cast<unsigned>(plan.splits));
  if (const char* error = launch_kernel(
          igemm_wgrad<TILE, VECTOR>, grid, dim3(TILE::THREADS), TILE::STAGES * TILE::STAGE_BYTES, args.stream, p,
          WgradGeometry(p, ceil_div(columns, TILE::BLOCK_N)), strides_of(p.y_layout, p.k, p.p(), p.q()),
          strides_of(p.x_layout, p.c, p.h, p.w), static_cast<int32_t>(std::min(plan.pixels_per_split, p.npq())),
          static_cast<int32_t>(p.npq()), columns, static_cast<const T*>(args.a), static_cast<const T*>(args.b),
          static_cast<float*>(args.workspace))) {
    return error;
  }
  return launch_reduce_splits<T>(args.workspace, args.out, p.w_size(), static_cast<int32_t>(plan.splits), args.stream);
}

template <class TILE, bool VECTOR>
constexpr Variant variant_of(const char* name) {
  Variant v = igemm_variant<TILE, VECTOR>(name, Pass::kWgrad);
  v.reject = reject<TILE, VECTOR>;
  v.workspace = workspace<TILE>;
  v.launch = launch<TILE, VECTOR>;
  return v;
}

}  // namespace
}  // namespace convext::cuda

namespace convext {

#define CONVEXT_IGEMM(T, dtype, k, form, tile, suffix, vector)             \
  extern const Variant wgrad_igemm_##dtype##_##tile##x##k##suffix##_sm80 = \
      cuda::variant_of<cuda::form##tile<T>, vector>("wgrad_igemm_" #dtype "_" #tile "x" #k #suffix "_sm80");
CONVEXT_IGEMM_DTYPES(CONVEXT_IGEMM_TILES)
CONVEXT_IGEMM(cuda::bf16, bf16, 64, Tile, 256x128, , true)
CONVEXT_IGEMM(cuda::fp16, f16, 64, Tile, 256x128, , true)
CONVEXT_IGEMM(float, tf32, 32, Tile, 256x128, , true)

}  // namespace convext
