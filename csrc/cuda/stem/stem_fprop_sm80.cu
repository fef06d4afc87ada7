// Convolution of a first layer, forward, on the tensor cores: y[n,p,q,k] = sum_{r,s,c} x[n,h,w,c] * w[k,r,s,c] of 1 to
// 4 channels, then the epilogue.
//
//   A (128 pixels, taps x 4 channels) out of the patch; B (taps x 4 channels, BLOCK_N filters) = w; C = y
//   grid: x = as many blocks as the largest GPU holds, each with every gridDim.x-th tile; y = tile of filters
//
//   once a block     all taps of its filters in the order of the fragments, and the table of taps
//   for each tile    the patch (stem.h), then a step for every 4 taps: 4 loads of pixels and 4 of filters (64 filters,
//                    bf16), 16 products of 16 x 8 x 16; the next tile's patch follows while other blocks multiply
//
// A step's four taps are the four lanes of a fragment's row, so it takes any four: 49 taps are 13 steps. Past the last
// tap a lane reads zeros, not pixels: a filter's zero times an infinite pixel would be NaN.
// Which filter is which column of B is chosen so that a thread ends with 8 neighbouring filters of a pixel: it stores
// 16 bytes of bf16 out of its registers.
//
// Budget at 7x7, 64 filters, bf16: 13*2048 B of filters, 416 of taps, 21 rows of patch at 360 = 34 KiB, with statistics
// one more; 64 registers of accumulators, 151 in all: 3 blocks, 12 warps. Of tf32 twice the bytes. Every step reads
// 13 KiB of shared memory for 128*64*16 products, 104 cycles beside 103 of the tensor cores, and issues 67 instructions
// for the 16 of a warp: most of the rest move what a pixel's load brings side by side to where a fragment wants it.
// Bytes: x once through memory and half of it again from L2, y once. An output of 64 filters takes 2*147*64 FLOP at 7x7
// of 3 channels for 128 bytes written and, at stride 2, 24 read.
//
// @sass stem_fprop<StemTile<float, .*, 64,        shared=67456 warps=12 warps_sm_80=8 per_mma=4.6
// @sass stem_fprop<StemTile<float, .*, 32,        shared=40832 warps=16 warps_sm_80=12 per_mma=5
// @sass stem_fprop<StemTile<.*, 64, .*            shared=34616 warps=12 per_mma=4.5
// @sass stem_fprop<StemTile<.*, 32, .*            shared=21304 warps=16 per_mma=6
#include "cuda/tile/epilogue.h"
#include "cuda/tile/statistics.h"
#include "stem.h"

namespace convext::cuda {
namespace {

// Each warp has two rows of the tile's pixels and all filters. ROW_BYTES: of four taps. One stage: nothing is in
// flight while a block multiplies, and other blocks fill the gap.
template <class T_, int M, int N, int WARPS_M_, int WARPS_N_, int STAGES_, int BLOCKS_, int ROW_BYTES_>
struct StemTile {
  using T = T_;
  static constexpr int BLOCK_N = N, BLOCKS = BLOCKS_, ROW_BYTES = ROW_BYTES_;
  static constexpr int PARTS = N / 32;              // of 32 filters, 8 for each lane of a row
  static constexpr int MMA_N = N / 8;               // columns of 8
  static constexpr int MMAS = ROW_BYTES / 32;       // for a step
  static constexpr int STEP_BYTES = N * ROW_BYTES;  // filters of a step
  static constexpr int TAP_BYTES = 8, STEP_TAPS = 4;
  static constexpr int SCRATCH_BYTES = merge_scratch(32, 32) * 4;  // of the statistics
  static_assert(M == kStemPixels && WARPS_M_ * WARPS_N_ * 32 == kStemThreads && WARPS_N_ == 1);
  static_assert(ROW_BYTES == STEP_TAPS * StemPixel<T>::BYTES);
};
template <class T, int N, int BLOCKS>
using FpropTile = StemTile<T, kStemPixels, N, 4, 1, 1, BLOCKS, 16 * sizeof(T)>;

// Where things lie in shared memory.
struct FpropShared {
  int32_t taps, zeros, patch, bytes;
  FpropShared(int32_t steps, int32_t step_bytes, int64_t patch_bytes, int32_t scratch_bytes)
      : taps(steps * step_bytes),
        zeros(taps + steps * 4 * 8),
        patch(zeros + 16),
        bytes(static_cast<int32_t>(patch + std::max<int64_t>(patch_bytes, scratch_bytes))) {}
};

// The four channels of every tap of the block's filters, in the order in which lanes read their fragments of B. Column
// `column` of 8 neighbours is filter j / 4 * 32 + column / 2 * 8 + j % 4 * 2 + column % 2 of the block's, j being the
// number of the eight.
template <class TILE>
CONVEXT_DEVICE void load_filters(const ConvProblem& problem, const StemPlan& plan, int32_t n0, int32_t steps,
                                 const typename TILE::T* w, uint32_t filters) {
  using T = typename TILE::T;
  const int32_t count = steps * TILE::STEP_TAPS * TILE::BLOCK_N;
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < count; i += kStemThreads) {
    const int32_t t = i % 4, filter = i / 4 % TILE::BLOCK_N, step = i / 4 / TILE::BLOCK_N, tap = step * 4 + t;
    const int32_t j = filter / 32 * 4 + filter % 8 / 2, lane = (filter % 32 / 8 * 2 + filter % 2) * 4 + t;
    const bool inside = tap < plan.taps && n0 + filter < problem.k;
    const T* from = w + (inside ? (int64_t{n0 + filter} * plan.taps + tap) * problem.c : 0);
    T channels[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) channels[c] = inside && c < problem.c ? __ldg(from + c) : from_accumulate<T>(0);
    const int32_t at = TILE::MMAS == 1 ? j / 2 * 512 + lane * 16 + j % 2 * 8 : j * 512 + lane * 16;
    store_pixel<T>(filters + step * TILE::STEP_BYTES + at, channels);
  }
}

// For each tap what a pixel's address is multiplied by and what is added: the distance of what the tap reads; past the
// last tap, where there are zeros for all pixels.
CONVEXT_DEVICE void write_taps(const ConvProblem& problem, const StemPlan& plan, int32_t steps, int32_t pixel_bytes,
                               uint32_t taps, uint32_t zeros) {
  if (threadIdx.x == 0) ptx::store_shared_16(zeros, {0, 0, 0, 0});
  for (int32_t tap = threadIdx.x; tap < steps * 4; tap += kStemThreads) {
    int32_t r, s;
    plan.by_filter_row(static_cast<uint32_t>(tap), r, s);
    const bool exists = tap < plan.taps;
    const int32_t distance = r * problem.dil_h * plan.pitch + s * problem.dil_w * pixel_bytes;
    ptx::store_shared_8(taps + tap * 8, {exists ? static_cast<uint32_t>(distance) : zeros, exists});
  }
}

// The epilogue and the statistics, out of the registers: 32 filters of the lane's four pixels at a time.
template <class TILE>
CONVEXT_DEVICE void store_tile(const ConvProblem& problem, const StemPlan& plan, const StemTileAt& at, int32_t tile,
                               int32_t n0, const float (&acc)[2][TILE::MMA_N][4], float* scratch,
                               const Strides& strides, typename TILE::T* y, const Epilogue& epilogue, bool vector,
                               const PartialStats<float>& stats) {
  using T = typename TILE::T;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t p0 = at.p + warp * 2, q0 = at.q + lane / 4, first = n0 + lane % 4 * 8;
  const int64_t pixel = at.n * strides.n + p0 * strides.h + q0 * strides.w + first * strides.c;
#pragma unroll
  for (int part = 0; part < TILE::PARTS; ++part) {
    const int32_t column = first + part * 32;
    float v[4][8];
#pragma unroll
    for (int i = 0; i < 32; ++i) v[i / 8][i % 8] = acc[i / 16][part * 4 + i % 8 / 2][i / 8 % 2 * 2 + i % 2];
    const auto span = [&](int row) {
      const int64_t offset = pixel + row / 2 * strides.h + row % 2 * 8 * strides.w + part * 32 * strides.c;
      return Span{column, 1, offset, strides.c, problem.k - column, vector};
    };
    const auto inside = [&](int row) {
      return p0 + row / 2 < plan.p && q0 + row % 2 * 8 < plan.q && column < problem.k;
    };
    const auto by_channel = [&](const void* array, auto&& apply) {
      if (!array) return;
      float of[8];
      load_channels(array, span(0), of);
#pragma unroll
      for (int i = 0; i < 32; ++i) apply(v[i / 8][i % 8], of[i % 8]);
    };
    by_channel(epilogue.scale, [](float& value, float scale) { value *= scale; });
    by_channel(epilogue.shift, [](float& value, float shift) { value += shift; });
    if (epilogue.residual) {
#pragma unroll
      for (int row = 0; row < 4; ++row) {
        if (inside(row)) add_residual<T>(epilogue, v[row], span(row));
      }
    }
    visit_activation<float>(epilogue.activation, [&](auto activation) {
#pragma unroll
      for (int i = 0; i < 32; ++i) v[i / 8][i % 8] = activation.forward(v[i / 8][i % 8]);
    });
    Welford<float, 8> seen;
#pragma unroll
    for (int row = 0; row < 4; ++row) {
      if (!inside(row)) continue;
      store_span(y, v[row], span(row));
      if (stats.moments) seen.template add_stored<T>(v[row]);
    }
    if (stats.moments) {
      const int row = warp * 8 + lane / 4;
      merge_block(seen, scratch, row, 32, lane % 4 * 8, 32, [&](int i, float count, float mean, float m2) {
        const int32_t channel = n0 + part * 32 + i;
        if (channel < problem.k) stats.store(tile, channel, count, mean, m2);
      });
      __syncthreads();  // the statistics are read before others, or the next patch, take their place
    }
  }
}

template <class TILE>
__global__ void __launch_bounds__(kStemThreads, TILE::BLOCKS)
    stem_fprop(ConvProblem problem, StemPlan plan, FpropShared places, int32_t steps, Strides x_strides,
               Strides y_strides, const typename TILE::T* __restrict__ x, const typename TILE::T* __restrict__ w,
               typename TILE::T* __restrict__ y, Epilogue epilogue, bool vector, PartialStats<float> stats) {
  using T = typename TILE::T;
  constexpr int WORDS = StemPixel<T>::WORDS, BYTES = StemPixel<T>::BYTES;
  CONVEXT_SHARED_MEMORY(shared);
  const uint32_t filters = keep(ptx::shared_address(shared));
  const uint32_t taps = filters + places.taps, patch = filters + places.patch;
  const int32_t n0 = static_cast<int32_t>(blockIdx.y) * TILE::BLOCK_N;
  load_filters<TILE>(problem, plan, n0, steps, w, filters);
  write_taps(problem, plan, steps, BYTES, taps, filters + places.zeros);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t b_from = keep(filters + lane * 16), taps_from = keep(taps + lane % 4 * TILE::TAP_BYTES);
  // The lane's first pixel; its others are of the other half of the columns, and of the warp's other row.
  const uint32_t a_from =
      keep(patch + warp * 2 * problem.stride_h * plan.pitch + (lane / 4 * problem.stride_w + plan.shift) * BYTES);
  const int32_t to_half = 8 * problem.stride_w * BYTES, to_row = problem.stride_h * plan.pitch;
#pragma unroll 1
  for (int32_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    load_patch(problem, plan, x_strides, x, StemTileAt(plan, tile), patch);
    __syncthreads();  // patch, filters and taps are whole
    float acc[2][TILE::MMA_N][4] = {};
    uint32_t b_at = b_from, taps_at = taps_from;
#pragma unroll 1
    for (int32_t step = 0; step < steps; ++step) {
      const uint2 tap = ptx::load_shared_8(taps_at);
      uint32_t b[TILE::MMA_N][WORDS];
#pragma unroll
      for (int i = 0; i < TILE::MMA_N * WORDS; i += 4) {
        const uint4 four = ptx::load_shared_16(b_at + i * 128);
        b[i / WORDS][i % WORDS] = four.x, b[i / WORDS][i % WORDS + 1] = four.y;
        b[(i + 2) / WORDS][(i + 2) % WORDS] = four.z, b[(i + 2) / WORDS][(i + 2) % WORDS + 1] = four.w;
      }
      StemPixel<T> a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = load_pixel<T>((a_from + i / 2 * to_row + i % 2 * to_half) * tap.y + tap.x);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int m = 0; m < TILE::MMAS; ++m) {
          const uint32_t pixels[4] = {a[i * 2].words[m * 2], a[i * 2 + 1].words[m * 2], a[i * 2].words[m * 2 + 1],
                                      a[i * 2 + 1].words[m * 2 + 1]};
#pragma unroll
          for (int j = 0; j < TILE::MMA_N; ++j) {
            const uint32_t columns[2] = {b[j][m * 2], b[j][m * 2 + 1]};
            ptx::mma<T>(acc[i][j], pixels, columns);
          }
        }
      }
      b_at += TILE::STEP_BYTES, taps_at += 4 * TILE::TAP_BYTES;
    }
    __syncthreads();  // all have read the patch before the next one, or the statistics, take its place
    const StemTileAt at(plan, static_cast<int32_t>(keep(tile)));  // again: registers are few while it multiplies
    store_tile<TILE>(problem, plan, at, tile, n0, acc, reinterpret_cast<float*>(shared + places.patch), y_strides, y,
                     epilogue, vector, stats);
  }
}

int32_t steps_of(const ConvProblem& p) { return static_cast<int32_t>(ceil_div(int64_t{p.r} * p.s, 4)); }

template <class TILE>
const char* reject(const ConvProblem& p) {
  if (const char* why = reject_stem(p)) return why;
  const double filters = std::ceil(double(p.r) * p.s / 4) * (TILE::STEP_BYTES + 4 * TILE::TAP_BYTES);
  const int64_t patch = StemPlan::most_patch_bytes(p, StemPixel<typename TILE::T>::BYTES);
  if (filters + double(std::max<int64_t>(patch, TILE::SCRATCH_BYTES)) + 16 > kMostStemShared) {
    return "filters and patch do not fit into shared memory";
  }
  if (ceil_div(p.k, TILE::BLOCK_N) > 65535) return "there are too many filters";
  return nullptr;
}

int64_t stats_rows(const ConvProblem& p) { return StemPlan(p, 8, 4).tiles; }

template <class TILE>
const char* launch(const ConvProblem& p, const LaunchArgs& args) {
  using T = typename TILE::T;
  constexpr int BYTES = StemPixel<T>::BYTES;
  const StemPlan plan(p, BYTES, 32 / BYTES);
  const int32_t steps = steps_of(p);
  const FpropShared places(steps, TILE::STEP_BYTES, plan.bytes, args.stats ? TILE::SCRATCH_BYTES : 0);
  const int64_t across = ceil_div(p.k, TILE::BLOCK_N), held = ceil_div(kProcessors * TILE::BLOCKS, across);
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(plan.tiles, held)), static_cast<unsigned>(across));
  const bool vector = p.y_layout == Layout::kNHWC && p.k % 8 == 0;
  return launch_kernel(stem_fprop<TILE>, grid, dim3(kStemThreads), places.bytes, args.stream, p, plan, places, steps,
                       strides_of(p.x_layout, p.c, p.h, p.w), strides_of(p.y_layout, p.k, p.p(), p.q()),
                       static_cast<const T*>(args.a), static_cast<const T*>(args.b), static_cast<T*>(args.out),
                       args.epilogue, vector, PartialStats<float>(args.stats, plan.tiles, p.k));
}

template <class TILE>
constexpr Variant variant_of(const char* name) {
  using T = typename TILE::T;
  Variant v = cuda_variant<T>(name, Algorithm::stem, Pass::kFprop, Layouts::kAny, DTypeOf<T>::on_tensor_cores);
  v.pack_format = krsc_format;
  v.reject = reject<TILE>;
  v.cost = stem_cost;
  v.gathers = true;
  v.launch = launch<TILE>;
  v.stats_rows = stats_rows;
  v.block_m = kStemPixels, v.block_n = TILE::BLOCK_N, v.block_k = 16;
  return v;
}

}  // namespace
}  // namespace convext::cuda

namespace convext {

#define CONVEXT_STEM(T, dtype, n, blocks)                       \
  extern const Variant fprop_stem_##dtype##_128x##n##x16_sm80 = \
      cuda::variant_of<cuda::FpropTile<T, n, blocks>>("fprop_stem_" #dtype "_128x" #n "x16_sm80");
CONVEXT_STEM(cuda::bf16, bf16, 64, 3)
CONVEXT_STEM(cuda::bf16, bf16, 32, 4)
CONVEXT_STEM(cuda::fp16, f16, 64, 3)
CONVEXT_STEM(cuda::fp16, f16, 32, 4)
CONVEXT_STEM(float, tf32, 64, 3)
CONVEXT_STEM(float, tf32, 32, 4)

}  // namespace convext
