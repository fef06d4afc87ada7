// Implicit GEMM whose rows are pixels: fprop (rows = output pixels) and dgrad (rows = input pixels) are one kernel.
//
//   out[pixel, col] = sum over taps and channels of in[pixel moved by the tap, channel] * w
//
//   fprop  in = x,  col = filter k,   A (NPQ, RSC) by im2col on the fly,  B (RSC, K): w in KRSC order is K-major
//   dgrad  in = dy, col = channel c,  A (NHW, RSK) by im2col on the fly,  B (RSK, C): the same w is N-major
//
// core/axis.h has the map from pixels and taps to what they read. The classes of dgrad are the grid's z.
//
//        block tile              warp tiles                 a step of the main loop
//          BLOCK_N                                            wait for the oldest stage; barrier
//        +---------+             +----+----+                  start loading the stage that was read last time
// BLOCK_M|  acc    |     =       | w0 | w1 | WARP_M           the mma steps of the oldest stage
//        +---------+             +----+----+
//
// Taps that meet only padding for all pixels of the tile are skipped: with dilation 12 on 33x33 a third of the work.
#pragma once
#include <type_traits>

#include "cuda/tile/epilogue.h"
#include "cuda/tile/statistics.h"
#include "igemm_block.h"
#include "igemm_gather.h"
#include "igemm_load.h"

namespace convext::cuda {

// 16 rows of a warp's accumulators into its slab, as a plain matrix.
template <class TILE>
CONVEXT_DEVICE void store_slab(const float (&acc)[TILE::MMA_N][4], float* slab) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < TILE::MMA_N; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      *reinterpret_cast<float2*>(slab + (lane / 4 + half * 8) * TILE::SLAB_PITCH + j * 8 + lane % 4 * 2) =
          make_float2(acc[j][half * 2], acc[j][half * 2 + 1]);
    }
  }
}

// The epilogue and the statistics: 16 rows of a warp at a time through shared memory, so that stores are 16 bytes of
// one pixel. The loops stay loops: unrolled, six activations would be compiled dozens of times.
template <class TILE, bool DGRAD>
CONVEXT_DEVICE void store_pixels(const PixelsBlock<TILE, DGRAD>& block, const float (&acc)[TILE::MMA_M][TILE::MMA_N][4],
                                 unsigned char* shared, const Strides& out_strides, typename TILE::T* out,
                                 const Epilogue& epilogue, bool vector_out, const PartialStats<float>& stats) {
  using T = typename TILE::T;
  constexpr int CHUNK = TILE::CHUNK, LANES = TILE::WARP_N / CHUNK;  // that share a row
  constexpr int PASSES = 16 * LANES / 32;
  static_assert(PASSES >= 1 && 16 * LANES % 32 == 0);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp / TILE::WARPS_N, warp_n = warp % TILE::WARPS_N;
  const int col = lane % LANES * CHUNK;
  float* slab = reinterpret_cast<float*>(shared) + warp * 16 * TILE::SLAB_PITCH;  // (16, SLAB_PITCH)
  const int32_t column = block.n0 + warp_n * TILE::WARP_N + col, channel = block.group * block.columns + column;
  Welford<float, CHUNK> seen;
#pragma unroll 1
  for (int i = 0; i < TILE::MMA_M; ++i) {
#pragma unroll
    for (int source = 0; source < TILE::MMA_M; ++source) {  // registers have no index: the wanted rows by comparison
      if (source == i) store_slab<TILE>(acc[source], slab);
    }
    __syncwarp();  // the slab is written before it is read
#pragma unroll 1
    for (int pass = 0; pass < PASSES; ++pass) {
      const int row = pass * (32 / LANES) + lane / LANES;
      const int32_t m = block.m0 + warp_m * TILE::WARP_M + i * 16 + row;
      if (m >= block.gemm_m || column >= block.columns) continue;
      const float* sums = slab + row * TILE::SLAB_PITCH + col;
      int32_t n, y_row, y_col;
      block.decode(m, n, y_row, y_col);
      const int64_t offset = n * out_strides.n + int64_t{block.rows.output(y_row)} * out_strides.h +
                             int64_t{block.cols.output(y_col)} * out_strides.w + channel * out_strides.c;
      const Span span{channel, 1, offset, out_strides.c, block.columns - column, vector_out};
      float v[CHUNK];
#pragma unroll
      for (int e = 0; e < CHUNK; e += 4) {  // the columns of a thread start at a multiple of 16 bytes
        *reinterpret_cast<float4*>(v + e) = *reinterpret_cast<const float4*>(sums + e);
      }
      apply_epilogue<T>(epilogue, v, span);
      store_span(out, v, span);
      if (!DGRAD && stats.moments) seen.template add_stored<T>(v);
    }
    __syncwarp();  // the slab is read before it is written again
  }

  if (!DGRAD && stats.moments) {  // a thread has seen one column of chunks all along
    constexpr int ROWS = TILE::WARPS_M * (32 / LANES);
    static_assert(merge_scratch(ROWS, TILE::BLOCK_N) * 4 <= TILE::SHARED_BYTES);
    __syncthreads();  // all have read their slabs before the memory serves the statistics
    merge_block(seen, reinterpret_cast<float*>(shared), warp_m * (32 / LANES) + lane / LANES, ROWS,
                warp_n * TILE::WARP_N + col, TILE::BLOCK_N, [&](int column, float count, float mean, float m2) {
      if (block.n0 + column < block.columns) {
        stats.store(block.m_tile, int64_t{block.group} * block.columns + block.n0 + column, count, mean, m2);
      }
    });
  }
}

// Dynamic shared memory: the stages, or the slabs, and behind them what the loader keeps.
template <class TILE, bool DGRAD, bool VECTOR>
constexpr int igemm_shared_bytes = TILE::SHARED_BYTES + (VECTOR ? VectorLoader<TILE, DGRAD>::SCRATCH_BYTES : 0);

template <class TILE, bool DGRAD, bool VECTOR>
__global__ void __launch_bounds__(TILE::THREADS, TILE::BLOCKS)
    igemm_pixels(ConvProblem problem, PixelsPlan plan, int32_t channels, int32_t columns, int32_t filter_chunks,
                 Strides in_strides, Strides out_strides, const typename TILE::T* __restrict__ in,
                 const typename TILE::T* __restrict__ w, typename TILE::T* __restrict__ out, Epilogue epilogue,
                 bool vector_out, PartialStats<float> stats) {
  using Loader = std::conditional_t<VECTOR, VectorLoader<TILE, DGRAD>, GatherLoader<TILE, DGRAD>>;
  constexpr int STAGES = TILE::STAGES;
  CONVEXT_SHARED_MEMORY(shared);
  const PixelsBlock<TILE, DGRAD> block(problem, plan, channels, columns);
  if (block.is_empty()) return;
  const uint32_t stages = keep(ptx::shared_address(shared));
  Loader loader(problem, block, in_strides, in, w, filter_chunks, stages + TILE::SHARED_BYTES);
  const int32_t steps = loader.steps;
#pragma unroll 1
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    if (stage < steps) loader.load_stage(stages + stage * TILE::STAGE_BYTES);
    ptx::cp_async_commit();
  }
  const int warp = threadIdx.x / 32;
  const Fragments<TILE, true, true> a_lane(warp / TILE::WARPS_N);
  const Fragments<TILE, false, !DGRAD> b_lane(warp % TILE::WARPS_N);
  Ring<TILE> ring(stages);
  float acc[TILE::MMA_M][TILE::MMA_N][4] = {};
#pragma unroll 1
  for (int32_t step = 0; step < steps; ++step) {
    ptx::cp_async_wait<STAGES - 2>();
    __syncthreads();  // the stage has landed for all threads, and all have read the one that is loaded next
    const bool more = step + STAGES - 1 < steps;
    multiply_stage<TILE, TILE::AHEAD>(acc, a_lane, b_lane, ring.read, [&] {
      if (more) loader.load_stage(ring.load);
    });
    ptx::cp_async_commit();
    ring.advance();
  }
  __syncthreads();  // all have read the last stages before their memory serves the epilogue
  store_pixels<TILE, DGRAD>(block, acc, shared, out_strides, out, epilogue, vector_out, stats);
}

template <class TILE, bool DGRAD, bool VECTOR>
const char* reject_igemm_pixels(const ConvProblem& p) {
  if constexpr (VECTOR) {
    if (const char* why = reject_vector_loader<TILE, DGRAD>(p)) return why;
  }
  if ((DGRAD ? p.nhw() : p.npq()) > kMostPixels) return "there are more than 2^31 pixels";
  if (p.groups > 65535) return "there are more than 65535 groups";
  if (DGRAD && int64_t{p.stride_h} * p.stride_w > 65535) return "the stride is too large";
  const int64_t reach = int64_t{p.pad_h} + p.pad_w + int64_t{p.dil_h} * p.r + int64_t{p.dil_w} * p.s;
  if (reach > INT32_MAX / 4) return "the padding or the dilated filter is too large";
  return nullptr;
}

template <class TILE>
int64_t igemm_stats_rows(const ConvProblem& p) {
  return ceil_div(p.npq(), TILE::BLOCK_M);
}

template <class TILE, bool DGRAD, bool VECTOR>
const char* launch_igemm_pixels(const ConvProblem& p, const LaunchArgs& args) {
  using T = typename TILE::T;
  const Strides x = strides_of(p.x_layout, p.c, p.h, p.w), y = strides_of(p.y_layout, p.k, p.p(), p.q());
  const int32_t channels = DGRAD ? p.k_per_group() : p.c_per_group();
  const int32_t columns = DGRAD ? p.c_per_group() : p.k_per_group();
  const int64_t largest_class = int64_t{p.n} * ceil_div(p.h, p.stride_h) * ceil_div(p.w, p.stride_w);
  const int64_t m_tiles = ceil_div(DGRAD ? largest_class : p.npq(), TILE::BLOCK_M);
  const int64_t n_tiles = ceil_div(columns, TILE::BLOCK_N), tiles = m_tiles * n_tiles;
  if (tiles > INT32_MAX) return "the grid would exceed 2^31 blocks";
  const dim3 grid(static_cast<unsigned>(tiles), p.groups, DGRAD ? p.stride_h * p.stride_w : 1);
  const bool vector_out = (DGRAD ? p.x_layout : p.y_layout) == Layout::kNHWC && columns % TILE::CHUNK == 0;
  return launch_kernel(igemm_pixels<TILE, DGRAD, VECTOR>, grid, dim3(TILE::THREADS),
                       igemm_shared_bytes<TILE, DGRAD, VECTOR>, args.stream, p, PixelsPlan(p, DGRAD, n_tiles), channels,
                       columns, p.r * p.s * (p.c_per_group() / TILE::CHUNK), DGRAD ? y : x, DGRAD ? x : y,
                       static_cast<const T*>(args.a), static_cast<const T*>(args.b), static_cast<T*>(args.out),
                       args.epilogue, vector_out, PartialStats<float>(args.stats, m_tiles, p.k));
}

// What the variants of the three passes say in the same words.
template <class TILE, bool VECTOR>
constexpr Variant igemm_variant(const char* name, Pass pass) {
  using T = typename TILE::T;
  Variant v = cuda_variant<T>(name, Algorithm::direct, pass, VECTOR ? Layouts::kNHWCOnly : Layouts::kAny,
                              DTypeOf<T>::on_tensor_cores);
  v.pack_format = krsc_format;
  v.cost = igemm_cost;
  v.gathers = !VECTOR;
  v.block_m = TILE::BLOCK_M, v.block_n = TILE::BLOCK_N, v.block_k = TILE::BLOCK_K;
  return v;
}

template <class TILE, bool DGRAD, bool VECTOR>
constexpr Variant igemm_pixels_variant(const char* name) {
  Variant v = igemm_variant<TILE, VECTOR>(name, DGRAD ? Pass::kDgrad : Pass::kFprop);
  v.reject = reject_igemm_pixels<TILE, DGRAD, VECTOR>;
  v.launch = launch_igemm_pixels<TILE, DGRAD, VECTOR>;
  v.stats_rows = DGRAD ? nullptr : igemm_stats_rows<TILE>;
  return v;
}

}  // namespace convext::cuda
