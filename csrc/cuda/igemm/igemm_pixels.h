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
// BLOCK_M|  acc    |     =       | w0 | w1 | WARP_M           two mma steps from the oldest stage
//        +---------+             +----+----+
//
// Taps that meet only padding for all pixels of the tile are skipped: with dilation 12 on 33x33 a third of the work.
#pragma once
#include "core/axis.h"
#include "cuda/tile/epilogue.h"
#include "cuda/tile/gemm.h"
#include "cuda/tile/statistics.h"
#include "cuda/tile/strides.h"
#include "igemm_tiles.h"

namespace convext::cuda {

struct Range {
  int32_t begin, end;
};

// The taps that meet the image for some position in [low, high]: a range, since the read moves one way with the tap.
CONVEXT_DEVICE Range active_taps(const Axis& axis, int32_t low, int32_t high) {
  const auto meets = [&](int32_t tap) { return axis.input(high, tap) >= 0 && axis.input(low, tap) < axis.in; };
  Range range{0, axis.taps};
  while (range.begin < range.end && !meets(range.begin)) ++range.begin;
  while (range.begin < range.end && !meets(range.end - 1)) --range.end;
  return range;
}

// Where in the reduction a thread stands: channels innermost, then the taps of a row, then the rows.
struct Reduction {
  int32_t channel, s, r;

  CONVEXT_DEVICE void advance(int32_t by, int32_t channels, const Range& taps_w) {
    channel += by;
    while (channel >= channels) {
      channel -= channels;
      if (++s == taps_w.end) s = taps_w.begin, ++r;
    }
  }
};

struct PixelDecoder {
  FastDiv by_image, by_row;
  CONVEXT_DEVICE PixelDecoder(int64_t height, int64_t width) : by_image(height * width), by_row(width) {}
  CONVEXT_DEVICE void operator()(int64_t m, int32_t& n, int32_t& i, int32_t& j) const {
    int32_t rest;
    by_image(static_cast<uint32_t>(m), n, rest);
    by_row(static_cast<uint32_t>(rest), i, j);
  }
};

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

// What a block computes: a tile of one class's pixels times some columns of one group, over the taps that meet the
// image.
template <class TILE, bool DGRAD>
struct PixelsBlock {
  const ConvProblem& problem;
  int32_t channels, columns;  // of the reduction, of the result; of one group
  int32_t group, n_tiles, n0;
  int64_t m0, gemm_m;
  Axis rows, cols;
  PixelDecoder decode;

  CONVEXT_DEVICE explicit PixelsBlock(const ConvProblem& p)
      : problem(p),
        channels(DGRAD ? p.k_per_group() : p.c_per_group()),
        columns(DGRAD ? p.c_per_group() : p.k_per_group()),
        group(blockIdx.y),
        n_tiles(static_cast<int32_t>(ceil_div(columns, TILE::BLOCK_N))),
        n0(static_cast<int32_t>(blockIdx.x % n_tiles) * TILE::BLOCK_N),
        m0(int64_t{blockIdx.x / n_tiles} * TILE::BLOCK_M),
        rows(height_of(p, DGRAD).at(DGRAD ? blockIdx.z / p.stride_w : 0)),
        cols(width_of(p, DGRAD).at(DGRAD ? blockIdx.z % p.stride_w : 0)),
        decode(max_of(1, rows.count), max_of(1, cols.count)) {
    gemm_m = int64_t{p.n} * rows.count * cols.count;
  }
  CONVEXT_DEVICE bool is_empty() const { return rows.count <= 0 || cols.count <= 0 || m0 >= gemm_m; }

  CONVEXT_DEVICE void active(Range& taps_h, Range& taps_w) const {
    const int64_t last = (m0 + TILE::BLOCK_M < gemm_m ? m0 + TILE::BLOCK_M : gemm_m) - 1;
    int32_t n_first, i_first, j_first, n_last, i_last, j_last;
    decode(m0, n_first, i_first, j_first);
    decode(last, n_last, i_last, j_last);
    const bool one_image = n_first == n_last, one_row = one_image && i_first == i_last;
    taps_h = one_image ? active_taps(rows, i_first, i_last) : active_taps(rows, 0, rows.count - 1);
    taps_w = one_row ? active_taps(cols, j_first, j_last) : active_taps(cols, 0, cols.count - 1);
  }
};

// Brings the operands of one step after the other into shared memory: A gathered from pixels, B from the filters.
//
// VECTOR: channels of a group come in whole 16-byte chunks and lie side by side. Without it elements are gathered one
// by one from any strides and the reduction is not padded: the first layer, odd channel counts, NCHW.
template <class TILE, bool DGRAD, bool VECTOR>
struct PixelsLoader {
  using T = typename TILE::T;
  static constexpr int CHUNK = TILE::CHUNK, BLOCK_K = TILE::BLOCK_K;
  static constexpr int A_ROWS = TILE::BLOCK_M * 4 / TILE::THREADS, A_STRIDE = TILE::THREADS / 4;
  static constexpr int B_CHUNKS = TILE::BLOCK_N / CHUNK;  // of a row of the N-major tile
  static constexpr int B_STRIDE = DGRAD ? TILE::THREADS / B_CHUNKS : TILE::THREADS / 4;
  static constexpr int B_ROWS = DGRAD ? (BLOCK_K + B_STRIDE - 1) / B_STRIDE : (TILE::BLOCK_N + B_STRIDE - 1) / B_STRIDE;

  const PixelsBlock<TILE, DGRAD> block;  // by value: a reference costs registers
  const Strides in_strides;
  const T *in, *w;
  Range taps_h, taps_w;
  int32_t tap_count, steps;
  // A: this thread's chunk of the reduction, and its pixels.
  int a_chunk, a_row;
  int64_t a_base[A_ROWS];
  int32_t a_h[A_ROWS], a_w[A_ROWS];
  Reduction a_at;
  // B: fprop shares A's place in the reduction; dgrad has one for each of its rows.
  int b_chunk, b_row;
  int64_t filter_size;
  Reduction b_at[DGRAD ? B_ROWS : 1];

  CONVEXT_DEVICE PixelsLoader(const PixelsBlock<TILE, DGRAD>& of, const Strides& strides, const T* input,
                              const T* weights)
      : block(of), in_strides(strides), in(input), w(weights) {
    const int tid = threadIdx.x;
    block.active(taps_h, taps_w);
    tap_count = (taps_h.end - taps_h.begin) * (taps_w.end - taps_w.begin);
    steps = static_cast<int32_t>(ceil_div(int64_t{tap_count} * block.channels, BLOCK_K));
    const Reduction start{0, taps_w.begin, tap_count ? taps_h.begin : taps_h.end};

    a_chunk = tid % 4, a_row = tid / 4;
#pragma unroll
    for (int i = 0; i < A_ROWS; ++i) {
      const int64_t m = block.m0 + a_row + i * A_STRIDE;
      int32_t n = 0, row = 0, col = 0;
      if (m < block.gemm_m) block.decode(m, n, row, col);
      a_h[i] = m < block.gemm_m ? block.rows.input(row, 0) : INT32_MIN / 2;  // never inside
      a_w[i] = block.cols.input(col, 0);
      a_base[i] = n * in_strides.n + int64_t{block.group} * block.channels * in_strides.c +
                  int64_t{a_h[i]} * in_strides.h + int64_t{a_w[i]} * in_strides.w;
    }
    a_at = start;
    if (tap_count) a_at.advance(a_chunk * CHUNK, block.channels, taps_w);

    b_chunk = DGRAD ? tid % B_CHUNKS : a_chunk, b_row = DGRAD ? tid / B_CHUNKS : a_row;
    filter_size = int64_t{tap_size()} * block.problem.r * block.problem.s;
    if constexpr (DGRAD) {
#pragma unroll
      for (int i = 0; i < B_ROWS; ++i) {
        b_at[i] = start;
        if (tap_count) b_at[i].advance(b_row + i * B_STRIDE, block.channels, taps_w);
      }
    }
  }

  // Channels, and filters, of a group.
  CONVEXT_DEVICE int32_t tap_size() const { return DGRAD ? block.columns : block.channels; }
  CONVEXT_DEVICE int32_t filters() const { return DGRAD ? block.channels : block.columns; }

  CONVEXT_DEVICE const T* read_in(int i, const Reduction& at, bool& inside) const {
    const Axis &rows = block.rows, &cols = block.cols;
    const int32_t h = a_h[i] + at.r * rows.in_tap_step, column = a_w[i] + at.s * cols.in_tap_step;
    inside = at.r < taps_h.end && h >= 0 && h < rows.in && column >= 0 && column < cols.in;
    return in + (inside ? a_base[i] + int64_t{at.r} * rows.in_tap_step * in_strides.h +
                              int64_t{at.s} * cols.in_tap_step * in_strides.w + at.channel * in_strides.c
                        : 0);
  }
  CONVEXT_DEVICE const T* read_w(int32_t k, int32_t c, const Reduction& at, bool& inside) const {
    inside = inside && at.r < taps_h.end;
    const int32_t r = block.rows.tap(at.r), s = block.cols.tap(at.s);
    return w + (inside ? (int64_t{block.group} * filters() + k) * filter_size +
                             (int64_t{r} * block.problem.s + s) * tap_size() + c
                       : 0);
  }

  // One 16-byte chunk of A: channels from `at` on of pixel i.
  CONVEXT_DEVICE void load_a(unsigned char* tile, int i) const {
    const uint32_t at = k_major_offset(a_row + i * A_STRIDE, a_chunk);
    if constexpr (VECTOR) {
      bool inside;
      const T* source = read_in(i, a_at, inside);
      ptx::cp_async_16(ptx::shared_address(tile) + at, source, inside);
    } else {
      Vector<T> chunk;
      Reduction element = a_at;
#pragma unroll
      for (int e = 0; e < CHUNK; ++e) {
        bool inside;
        const T* source = read_in(i, element, inside);
        chunk.v[e] = inside ? __ldg(source) : from_accumulate<T>(0);
        if (tap_count) element.advance(1, block.channels, taps_w);
      }
      store_chunk(tile + at, chunk);
    }
  }

  // One 16-byte chunk of B, along the reduction in fprop and along the columns in dgrad.
  CONVEXT_DEVICE void load_b(unsigned char* tile, int row, const Reduction& place) const {
    const uint32_t at = DGRAD ? mn_major_offset<T, TILE::BLOCK_N>(row, b_chunk) : k_major_offset(row, b_chunk);
    const int32_t column = block.n0 + (DGRAD ? b_chunk * CHUNK : row);
    if constexpr (VECTOR) {
      bool inside = column < block.columns;
      const T* source =
          DGRAD ? read_w(place.channel, column, place, inside) : read_w(column, place.channel, place, inside);
      ptx::cp_async_16(ptx::shared_address(tile) + at, source, inside);
    } else {
      Vector<T> chunk;
      Reduction element = place;
#pragma unroll
      for (int e = 0; e < CHUNK; ++e) {
        bool inside = column + (DGRAD ? e : 0) < block.columns;
        const T* source = DGRAD ? read_w(element.channel, column + e, element, inside)
                                : read_w(column, element.channel, element, inside);
        chunk.v[e] = inside ? __ldg(source) : from_accumulate<T>(0);
        if (!DGRAD && tap_count) element.advance(1, block.channels, taps_w);
      }
      store_chunk(tile + at, chunk);
    }
  }

  // Starts loading the next BLOCK_K of the reduction into a stage, and moves on.
  CONVEXT_DEVICE void load_stage(unsigned char* a_tile) {
#pragma unroll
    for (int i = 0; i < A_ROWS; ++i) load_a(a_tile, i);
#pragma unroll
    for (int i = 0; i < B_ROWS; ++i) {
      const int row = b_row + i * B_STRIDE;
      if (row >= (DGRAD ? BLOCK_K : TILE::BLOCK_N)) break;
      Reduction& place = DGRAD ? b_at[i] : a_at;
      load_b(a_tile + TILE::A_BYTES, row, place);
      if constexpr (DGRAD) place.advance(BLOCK_K, block.channels, taps_w);
    }
    a_at.advance(BLOCK_K, block.channels, taps_w);
  }
};

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
  float* slab = reinterpret_cast<float*>(shared) + warp * 16 * TILE::SLAB_PITCH;  // (16, SLAB_PITCH)
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
      const int row = pass * (32 / LANES) + lane / LANES, col = lane % LANES * CHUNK;
      const int64_t m = block.m0 + warp_m * TILE::WARP_M + i * 16 + row;
      const int32_t column = block.n0 + warp_n * TILE::WARP_N + col;
      if (m >= block.gemm_m || column >= block.columns) continue;
      const float* sums = slab + row * TILE::SLAB_PITCH + col;
      int32_t n, y_row, y_col;
      block.decode(m, n, y_row, y_col);
      const int32_t channel = block.group * block.columns + column;
      const int64_t offset = n * out_strides.n + int64_t{block.rows.output(y_row)} * out_strides.h +
                             int64_t{block.cols.output(y_col)} * out_strides.w + channel * out_strides.c;
      const Span span{channel, 1, offset, out_strides.c, block.columns - column, vector_out};
      float v[CHUNK];
#pragma unroll
      for (int e = 0; e < CHUNK; ++e) v[e] = sums[e];
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
                warp_n * TILE::WARP_N + lane % LANES * CHUNK, TILE::BLOCK_N,
                [&](int column, float count, float mean, float m2) {
      if (block.n0 + column < block.columns) {
        stats.store(blockIdx.x / block.n_tiles, int64_t{block.group} * block.columns + block.n0 + column, count, mean,
                    m2);
      }
    });
  }
}

template <class TILE, bool DGRAD, bool VECTOR>
__global__ void __launch_bounds__(TILE::THREADS, 1)
    igemm_pixels(ConvProblem problem, Strides in_strides, Strides out_strides, const typename TILE::T* __restrict__ in,
                 const typename TILE::T* __restrict__ w, typename TILE::T* __restrict__ out, Epilogue epilogue,
                 bool vector_out, PartialStats<float> stats) {
  constexpr int STAGES = TILE::STAGES;
  CONVEXT_SHARED_MEMORY(shared);
  const PixelsBlock<TILE, DGRAD> block(problem);
  if (block.is_empty()) return;
  PixelsLoader<TILE, DGRAD, VECTOR> loader(block, in_strides, in, w);
  const int32_t steps = loader.steps;
  const int warp = threadIdx.x / 32;
  float acc[TILE::MMA_M][TILE::MMA_N][4] = {};
#pragma unroll 1
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    if (stage < steps) loader.load_stage(shared + stage * TILE::STAGE_BYTES);
    ptx::cp_async_commit();
  }
  for (int32_t step = 0; step < steps; ++step) {
    ptx::cp_async_wait<STAGES - 2>();
    __syncthreads();  // the stage has landed for all threads, and all have read the one that is loaded next
    const int ahead = step + STAGES - 1;
    if (ahead < steps) loader.load_stage(shared + ahead % STAGES * TILE::STAGE_BYTES);
    ptx::cp_async_commit();
    const unsigned char* a_tile = shared + step % STAGES * TILE::STAGE_BYTES;
    multiply_stage<TILE, true, !DGRAD>(acc, a_tile, a_tile + TILE::A_BYTES, warp / TILE::WARPS_N, warp % TILE::WARPS_N);
  }
  __syncthreads();  // all have read the last stages before their memory serves the epilogue
  store_pixels<TILE, DGRAD>(block, acc, shared, out_strides, out, epilogue, vector_out, stats);
}

template <class TILE, bool DGRAD, bool VECTOR>
const char* reject_igemm_pixels(const ConvProblem& p) {
  constexpr int CHUNK = TILE::CHUNK;
  if (VECTOR) {
    if (p.x_layout != Layout::kNHWC || p.y_layout != Layout::kNHWC) return "it takes channels-last tensors alone";
    if (p.c_per_group() % CHUNK || p.k_per_group() % CHUNK) {
      return "the channels of a group are not a multiple of 16 bytes";
    }
  }
  if ((DGRAD ? p.nhw() : p.npq()) > INT32_MAX) return "there are more than 2^31 pixels";
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
  const int32_t columns = DGRAD ? p.c_per_group() : p.k_per_group();
  const int64_t largest_class = int64_t{p.n} * ceil_div(p.h, p.stride_h) * ceil_div(p.w, p.stride_w);
  const int64_t m_tiles = ceil_div(DGRAD ? largest_class : p.npq(), TILE::BLOCK_M);
  const int64_t tiles = m_tiles * ceil_div(columns, TILE::BLOCK_N);
  if (tiles > INT32_MAX) return "the grid would exceed 2^31 blocks";
  const dim3 grid(static_cast<unsigned>(tiles), p.groups, DGRAD ? p.stride_h * p.stride_w : 1);
  const bool vector_out = (DGRAD ? p.x_layout : p.y_layout) == Layout::kNHWC && columns % TILE::CHUNK == 0;
  return launch_kernel(igemm_pixels<TILE, DGRAD, VECTOR>, grid, dim3(TILE::THREADS), TILE::SHARED_BYTES, args.stream, p,
                       DGRAD ? y : x, DGRAD ? x : y, static_cast<const T*>(args.a), static_cast<const T*>(args.b),
                       static_cast<T*>(args.out), args.epilogue, vector_out,
                       PartialStats<float>(args.stats, m_tiles, p.k));
}

// The order of the weights that the direct kernels read, and of the weight gradients that they write.
inline const char* krsc_format(const ConvProblem&) { return "krsc"; }

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
