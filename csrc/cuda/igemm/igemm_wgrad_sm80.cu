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
// Budget, by tile (igemm_tiles.h): 24 to 72 KiB of shared memory, 16 to 128 registers of accumulators; 64 FLOP for
// each byte that a block of 128x128 loads. Slabs cost splits*K*RSC*8 bytes of traffic, in L2 for all but the largest
// filters.
// `gather` collects elements one by one, for channels that are not whole 16-byte chunks (the first layer) and NCHW.
#include "cuda/tile/gemm.h"
#include "cuda/tile/reduce_splits.h"
#include "igemm_pixels.h"
#include "igemm_tiles.h"

namespace convext::cuda {
namespace {

constexpr int64_t kTargetBlocks = 2 * kProcessors;

// Which stretches of pixels meet the image through some tap of the tile's columns [first, last].
struct PixelSkip {
  ConvProblem problem;
  int32_t r_first, r_last, s_first, s_last;  // of the tile's columns
  int64_t npq;

  CONVEXT_DEVICE bool meets(int64_t begin, int64_t end, const PixelDecoder& decode) const {
    int32_t n_first, p_first, q_first, n_last, p_last, q_last;
    decode(begin, n_first, p_first, q_first);
    decode((end < npq ? end : npq) - 1, n_last, p_last, q_last);
    if (n_first != n_last) return true;
    if (problem.h_of(p_last, r_last) < 0 || problem.h_of(p_first, r_first) >= problem.h) return false;
    if (p_first != p_last || r_first != r_last) return true;
    return problem.w_of(q_last, s_last) >= 0 && problem.w_of(q_first, s_first) < problem.w;
  }
};

// Brings dy and im2col(x) for one stretch of BLOCK_K pixels after the other into shared memory. A thread's chunks are
// fixed columns; its pixels lie a fixed distance apart.
template <class TILE, bool VECTOR>
struct WgradLoader {
  using T = typename TILE::T;
  static constexpr int CHUNK = TILE::CHUNK, BLOCK_K = TILE::BLOCK_K;
  static constexpr int A_CHUNKS = TILE::BLOCK_M / CHUNK, A_STRIDE = TILE::THREADS / A_CHUNKS;
  static constexpr int B_CHUNKS = TILE::BLOCK_N / CHUNK, B_STRIDE = TILE::THREADS / B_CHUNKS;
  static_assert(TILE::THREADS % A_CHUNKS == 0 && TILE::THREADS % B_CHUNKS == 0);

  const ConvProblem& problem;
  const Strides &y_strides, &x_strides;
  const T *dy, *x;
  int32_t cg, kg, columns, group;  // columns: RSC of a group
  int64_t end;                     // of the split's pixels
  PixelDecoder decode;
  PixelSkip skip;
  bool may_skip;
  int a_chunk, a_row, b_chunk, b_row;
  int32_t filter, column, b_r, b_s, b_c;

  CONVEXT_DEVICE WgradLoader(const ConvProblem& p, const Strides& ys, const Strides& xs, const T* dy_, const T* x_,
                             int32_t m0, int32_t n0, int64_t end_, int64_t npq)
      : problem(p),
        y_strides(ys),
        x_strides(xs),
        dy(dy_),
        x(x_),
        cg(p.c_per_group()),
        kg(p.k_per_group()),
        columns(p.r * p.s * cg),
        group(blockIdx.y),
        end(end_),
        decode(p.p(), p.q()),
        skip{p, 0, 0, 0, 0, npq},
        may_skip(p.is_dilated()) {
    int32_t unused;
    tap_of(n0, skip.r_first, skip.s_first, unused);
    tap_of(min_of(n0 + TILE::BLOCK_N, columns) - 1, skip.r_last, skip.s_last, unused);
    const int tid = threadIdx.x;
    a_chunk = tid % A_CHUNKS, a_row = tid / A_CHUNKS;
    b_chunk = tid % B_CHUNKS, b_row = tid / B_CHUNKS;
    filter = m0 + a_chunk * CHUNK, column = n0 + b_chunk * CHUNK;
    tap_of(column, b_r, b_s, b_c);
  }

  // The tap and channel of a column.
  CONVEXT_DEVICE void tap_of(int32_t of, int32_t& r, int32_t& s, int32_t& c) const {
    c = of % cg;
    s = of / cg % problem.s;
    r = of / cg / problem.s;
  }

  // The first stretch from m on that meets the image.
  CONVEXT_DEVICE int64_t next_stretch(int64_t m) const {
    while (may_skip && m < end && !skip.meets(m, m + BLOCK_K, decode)) m += BLOCK_K;
    return m;
  }

  CONVEXT_DEVICE void load_dy(unsigned char* destination, int64_t m) const {
    if constexpr (VECTOR) {
      const bool inside = m < end && filter < kg;
      ptx::cp_async_16(ptx::shared_address(destination),
                       dy + (inside ? m * problem.k + int64_t{group} * kg + filter : 0), inside);
    } else {
      int32_t n, p, q;
      decode(m < end ? m : 0, n, p, q);
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
  }

  CONVEXT_DEVICE void load_x(unsigned char* destination, int64_t m) const {
    int32_t n, p, q;
    decode(m < end ? m : 0, n, p, q);
    const auto read_x = [&](int32_t r, int32_t s, int32_t c, bool& inside) -> const T* {
      const int32_t h = problem.h_of(p, r), w = problem.w_of(q, s);
      inside = inside && m < end && h >= 0 && h < problem.h && w >= 0 && w < problem.w;
      return x + (inside ? n * x_strides.n + h * x_strides.h + w * x_strides.w + (int64_t{group} * cg + c) * x_strides.c
                         : 0);
    };
    if constexpr (VECTOR) {
      bool inside = column < columns;
      const T* source = read_x(b_r, b_s, b_c, inside);
      ptx::cp_async_16(ptx::shared_address(destination), source, inside);
    } else {
      Vector<T> chunk;
      int32_t r = b_r, s = b_s, c = b_c;
#pragma unroll
      for (int e = 0; e < CHUNK; ++e) {
        bool inside = column + e < columns;
        const T* source = read_x(r, s, c, inside);
        chunk.v[e] = inside ? __ldg(source) : from_accumulate<T>(0);
        if (++c == cg) {
          c = 0;
          if (++s == problem.s) s = 0, ++r;
        }
      }
      store_chunk(destination, chunk);
    }
  }

  CONVEXT_DEVICE void load_stage(unsigned char* a_tile, int64_t first) const {
#pragma unroll
    for (int row = 0; row < BLOCK_K; row += A_STRIDE) {
      if (row + a_row >= BLOCK_K) break;
      load_dy(a_tile + mn_major_offset<T, TILE::BLOCK_M>(row + a_row, a_chunk), first + row + a_row);
    }
#pragma unroll
    for (int row = 0; row < BLOCK_K; row += B_STRIDE) {
      if (row + b_row >= BLOCK_K) break;
      load_x(a_tile + TILE::A_BYTES + mn_major_offset<T, TILE::BLOCK_N>(row + b_row, b_chunk), first + row + b_row);
    }
  }
};

// This warp's part of a slab, (kg, columns).
template <class TILE>
CONVEXT_DEVICE void store_partial(const float (&acc)[TILE::MMA_M][TILE::MMA_N][4], float* slab, int32_t k0, int32_t n0,
                                  int32_t kg, int32_t columns) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < TILE::MMA_M; ++i) {
#pragma unroll
    for (int j = 0; j < TILE::MMA_N; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int32_t k = k0 + i * 16 + lane / 4 + e / 2 * 8, n = n0 + j * 8 + lane % 4 * 2 + e % 2;
        if (k < kg && n < columns) slab[int64_t{k} * columns + n] = acc[i][j][e];
      }
    }
  }
}

template <class TILE, bool VECTOR>
__global__ void __launch_bounds__(TILE::THREADS, 1)
    igemm_wgrad(ConvProblem problem, Strides y_strides, Strides x_strides, int64_t pixels_per_split,
                const typename TILE::T* __restrict__ dy, const typename TILE::T* __restrict__ x,
                float* __restrict__ partial) {
  constexpr int BLOCK_K = TILE::BLOCK_K, STAGES = TILE::STAGES;
  CONVEXT_SHARED_MEMORY(shared);
  const int warp = threadIdx.x / 32, warp_m = warp / TILE::WARPS_N, warp_n = warp % TILE::WARPS_N;
  const int32_t n_tiles = static_cast<int32_t>(ceil_div(problem.r * problem.s * problem.c_per_group(), TILE::BLOCK_N));
  const int32_t m0 = static_cast<int32_t>(blockIdx.x / n_tiles) * TILE::BLOCK_M;
  const int32_t n0 = static_cast<int32_t>(blockIdx.x % n_tiles) * TILE::BLOCK_N;
  const int64_t npq = problem.npq(), begin = int64_t{blockIdx.z} * pixels_per_split;
  const int64_t end = begin + pixels_per_split < npq ? begin + pixels_per_split : npq;
  const WgradLoader<TILE, VECTOR> loader(problem, y_strides, x_strides, dy, x, m0, n0, end, npq);

  float acc[TILE::MMA_M][TILE::MMA_N][4] = {};
  int64_t next = loader.next_stretch(begin);
  int32_t loaded = 0;
  const auto load_next = [&](int stage) {
    if (next < end) {
      loader.load_stage(shared + stage * TILE::STAGE_BYTES, next);
      next = loader.next_stretch(next + BLOCK_K);
      ++loaded;
    }
    ptx::cp_async_commit();
  };
#pragma unroll 1
  for (int stage = 0; stage < STAGES - 1; ++stage) load_next(stage);
  for (int32_t step = 0; step < loaded; ++step) {
    ptx::cp_async_wait<STAGES - 2>();
    __syncthreads();  // the stage has landed for all threads, and all have read the one that is loaded next
    load_next((step + STAGES - 1) % STAGES);
    const unsigned char* a_tile = shared + step % STAGES * TILE::STAGE_BYTES;
    multiply_stage<TILE, false, false>(acc, a_tile, a_tile + TILE::A_BYTES, warp_m, warp_n);
  }
  float* slab = partial + (int64_t{blockIdx.z} * problem.k + int64_t{loader.group} * loader.kg) * loader.columns;
  store_partial<TILE>(acc, slab, m0 + warp_m * TILE::WARP_M, n0 + warp_n * TILE::WARP_N, loader.kg, loader.columns);
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
  if (const char* why = reject_igemm_pixels<TILE, false, VECTOR>(p)) return why;
  if (int64_t{p.r} * p.s * p.c_per_group() > INT32_MAX / 2) return "one filter has more than 2^30 weights";
  return nullptr;
}

template <class TILE, bool VECTOR>
const char* launch(const ConvProblem& p, const LaunchArgs& args) {
  using T = typename TILE::T;
  const WgradPlan plan = plan_of<TILE>(p);
  if (plan.tiles > INT32_MAX) return "the grid would exceed 2^31 blocks";
  const dim3 grid(static_cast<unsigned>(plan.tiles), p.groups, static_cast<unsigned>(plan.splits));
  if (const char* error = launch_kernel(
          igemm_wgrad<TILE, VECTOR>, grid, dim3(TILE::THREADS), TILE::STAGES * TILE::STAGE_BYTES, args.stream, p,
          strides_of(p.y_layout, p.k, p.p(), p.q()), strides_of(p.x_layout, p.c, p.h, p.w), plan.pixels_per_split,
          static_cast<const T*>(args.a), static_cast<const T*>(args.b), static_cast<float*>(args.workspace))) {
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

#define CONVEXT_IGEMM(T, dtype, k, tile, suffix, vector)                   \
  extern const Variant wgrad_igemm_##dtype##_##tile##x##k##suffix##_sm80 = \
      cuda::variant_of<cuda::Tile##tile<T>, vector>("wgrad_igemm_" #dtype "_" #tile "x" #k #suffix "_sm80");
CONVEXT_IGEMM_DTYPES(CONVEXT_IGEMM_TILES)
CONVEXT_IGEMM(cuda::bf16, bf16, 32, 256x128, , true)
CONVEXT_IGEMM(cuda::fp16, f16, 32, 256x128, , true)
CONVEXT_IGEMM(float, tf32, 16, 256x128, , true)

}  // namespace convext
