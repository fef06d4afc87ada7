// What the two kernels of a first layer share: a convolution of one group of 1 to 4 channels.
//
// An implicit GEMM copies each input pixel to shared memory once for each of the R*S/stride^2 places where a filter
// meets it, and a tap of 3 channels fills no 16-byte copy. Here a block brings the patch of the image that its tile of
// 8 x 16 output pixels meets into shared memory once, each pixel as 4 channels; fragments are read out of the patch:
//
//        tile                         patch                               a pixel: 4 channels, 8 bytes of bf16
//   8    +--------+      8 stride + R +---------------+                     +----+----+----+----+
//   rows +--------+  ->       - stride|               |                     | c0 | c1 | c2 | 0  |
//         16 columns                  +---------------+                     +----+----+----+----+
//
// Where in the patch a tap reads is one distance from where the output pixel stands, which a table in shared memory has
// for each tap: so strides, dilation, filters and both memory orders are all one. A fragment is one load of 8 bytes (16
// of tf32) for a pixel and a tap, since what the reduction's order is does not matter as long as both operands agree.
//
// Why not a packing pass that pads the channels in memory: for ResNet-50's stem at 256 images (77 MB in, 411 MB out) it
// would write and read 109 MB more, a third of what the layer must move, and the copies of an implicit GEMM out of it,
// 7 rows of 32 values a pixel, would pass 9 times as many bytes through shared memory as the patch has. Patches of 21 x
// 37 pixels for 128 outputs read 1.5 times the image, out of the second-level cache.
//
// Blocks stay: as many as the GPU holds, each walks over its tiles.
#pragma once
#include "cuda/cost.h"
#include "cuda/ptx/mma.h"
#include "cuda/ptx/shared.h"
#include "cuda/tile/gemm.h"
#include "cuda/tile/run.h"
#include "cuda/tile/strides.h"

namespace convext::cuda {

constexpr int kStemRows = 8, kStemCols = 16;  // of a tile of output pixels
constexpr int kStemPixels = kStemRows * kStemCols;
constexpr int kStemThreads = 128;
constexpr int64_t kMostStemShared = 96 * 1024;  // bytes: sm_86 and sm_89 have 99 KiB for a block

// A pixel in shared memory.
template <class T>
struct alignas(4 * sizeof(T)) StemPixel {
  static constexpr int BYTES = 4 * sizeof(T), WORDS = BYTES / 4;
  uint32_t words[WORDS];
};

template <class T>
CONVEXT_DEVICE StemPixel<T> load_pixel(uint32_t address) {
  StemPixel<T> pixel;
  if constexpr (sizeof(T) == 2) {
    const uint2 raw = ptx::load_shared_8(address);
    pixel.words[0] = raw.x, pixel.words[1] = raw.y;
  } else {
    const uint4 raw = ptx::load_shared_16(address);
    pixel.words[0] = raw.x, pixel.words[1] = raw.y, pixel.words[2] = raw.z, pixel.words[3] = raw.w;
  }
  return pixel;
}

// tf32 is rounded here, once, and not where fragments are read.
template <class T>
CONVEXT_DEVICE void store_pixel(uint32_t address, const T (&channels)[4]) {
  StemPixel<T> pixel;
  memcpy(pixel.words, channels, sizeof pixel.words);
  if constexpr (sizeof(T) == 2) {
    ptx::store_shared_8(address, {pixel.words[0], pixel.words[1]});
  } else {
    ptx::store_shared_16(address, {ptx::round_to_tf32(pixel.words[0]), ptx::round_to_tf32(pixel.words[1]),
                                   ptx::round_to_tf32(pixel.words[2]), ptx::round_to_tf32(pixel.words[3])});
  }
}

// Tiles, taps and patches of a problem, worked out on the host.
struct StemPlan {
  int32_t p, q;            // of y
  int32_t tiles, tiles_w;  // of pixels; in a row of them
  int32_t shift;           // pixels of a patch before its tile's first, so that runs of four are whole in the image
  int32_t runs;            // of four pixels, in a patch
  int32_t pitch, bytes;    // of a patch: of a row, of all
  int32_t taps;
  FastDiv by_image, by_row, by_patch_row, by_filter_row;

  // `lanes`: neighbouring output pixels whose loads share the banks. A row of taps ends, modulo the 128 bytes of all
  // banks, where the next one begins, so that a fragment of both meets no bank twice.
  StemPlan(const ConvProblem& problem, int pixel_bytes, int lanes)
      : p(problem.p()), q(problem.q()), taps(problem.r * problem.s), by_filter_row(problem.s) {
    const int64_t down = ceil_div(p, kStemRows), across = ceil_div(q, kStemCols);
    tiles_w = static_cast<int32_t>(across);
    tiles = static_cast<int32_t>(problem.n * down * across);
    by_image = FastDiv(down * across), by_row = FastDiv(across);
    shift = (4 - problem.pad_w % 4) % 4;
    const int32_t height = static_cast<int32_t>(height_of(problem));
    const int32_t row_runs = static_cast<int32_t>(ceil_div(shift + width_of(problem), 4));
    runs = height * row_runs;
    by_patch_row = FastDiv(row_runs);
    const int reach = (problem.s * problem.dil_w + (lanes - 1) * problem.stride_w) * pixel_bytes % 128;
    pitch = row_runs * 4 * pixel_bytes;
    pitch += (reach - pitch % 128 + 128) % 128;
    bytes = height * pitch;
  }
  static int64_t height_of(const ConvProblem& p) {
    return int64_t{kStemRows - 1} * p.stride_h + int64_t{p.r - 1} * p.dil_h + 1;
  }
  static int64_t width_of(const ConvProblem& p) {
    return int64_t{kStemCols - 1} * p.stride_w + int64_t{p.s - 1} * p.dil_w + 1;
  }
  // Of shared memory; of any problem, however large.
  static int64_t most_patch_bytes(const ConvProblem& p, int64_t pixel_bytes) {
    const double bytes = double(height_of(p)) * (double(width_of(p) + 6) * double(pixel_bytes) + 128);
    return bytes < 1e9 ? static_cast<int64_t>(bytes) : int64_t{1} << 30;
  }
};

// A tile's place.
struct StemTileAt {
  int32_t n, p, q;  // image, first row and column of y
  CONVEXT_DEVICE StemTileAt(const StemPlan& plan, int32_t tile) {
    int32_t rest;
    plan.by_image(static_cast<uint32_t>(tile), n, rest);
    plan.by_row(static_cast<uint32_t>(rest), p, q);
    p *= kStemRows, q *= kStemCols;
  }
};

// Runs of four neighbouring pixels of a patch: zeros outside of the image and past the channels. C: channels, where
// rows of the image are whole runs, so that a run is C loads of four elements, in NHWC or NCHW; 0 for loads one by one.
template <class T, int C, bool NHWC>
CONVEXT_DEVICE void load_runs(const ConvProblem& problem, const StemPlan& plan, const Strides& strides, const T* x,
                              const StemTileAt& at, uint32_t patch) {
  const int32_t top = at.p * problem.stride_h - problem.pad_h;
  const int32_t left = at.q * problem.stride_w - problem.pad_w - plan.shift;
  const int64_t start = at.n * strides.n + top * strides.h + left * strides.w;  // perhaps before the image
  const int32_t down = static_cast<int32_t>(strides.h), across = static_cast<int32_t>(strides.w);
#pragma unroll 1
  for (int32_t run = threadIdx.x; run < plan.runs; run += kStemThreads) {
    int32_t row, col;
    plan.by_patch_row(static_cast<uint32_t>(run), row, col);
    col *= 4;
    const uint32_t to = patch + row * plan.pitch + col * StemPixel<T>::BYTES;
    const bool in_row = static_cast<uint32_t>(top + row) < static_cast<uint32_t>(problem.h);
    T channels[4][4] = {};  // of each pixel
    if constexpr (C > 0) {
      const bool inside = in_row && static_cast<uint32_t>(left + col) < static_cast<uint32_t>(problem.w);
      const T* from = x + (inside ? start + (row * down + col * across) : 0);
      Run<T, 4> loaded[C];
#pragma unroll
      for (int c = 0; c < C; ++c) {
        loaded[c] = inside ? load_run<T, 4>(from + (NHWC ? c * 4 : c * strides.c)) : zero_run<T, 4>();
      }
#pragma unroll
      for (int i = 0; i < 4 * C; ++i) channels[i / C][i % C] = NHWC ? loaded[i / 4].v[i % 4] : loaded[i % C].v[i / C];
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool inside = in_row && static_cast<uint32_t>(left + col + i) < static_cast<uint32_t>(problem.w);
        const T* from = x + (inside ? start + (row * down + (col + i) * across) : 0);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (inside && c < problem.c) channels[i][c] = __ldg(from + c * strides.c);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) store_pixel<T>(to + i * StemPixel<T>::BYTES, channels[i]);
  }
}

// Brings the patch of a tile into shared memory.
template <class T>
CONVEXT_DEVICE void load_patch(const ConvProblem& problem, const StemPlan& plan, const Strides& strides, const T* x,
                               const StemTileAt& at, uint32_t patch) {
  const bool nhwc = problem.x_layout == Layout::kNHWC;
#define CONVEXT_RUNS(channels, layout) return load_runs<T, channels, layout>(problem, plan, strides, x, at, patch)
  if (problem.w % 4 != 0) CONVEXT_RUNS(0, true);
  switch (problem.c) {
    case 1: CONVEXT_RUNS(1, true);  // one channel lies in one way
    case 2:
      if (nhwc) CONVEXT_RUNS(2, true);
      CONVEXT_RUNS(2, false);
    case 3:
      if (nhwc) CONVEXT_RUNS(3, true);
      CONVEXT_RUNS(3, false);
    default:
      if (nhwc) CONVEXT_RUNS(4, true);
      CONVEXT_RUNS(4, false);
  }
#undef CONVEXT_RUNS
}

// What is the same for both passes.
inline const char* reject_stem(const ConvProblem& p) {
  if (p.groups != 1 || p.c > 4) return "it takes one group of at most 4 channels";
  const int64_t reach = int64_t{p.pad_h} + p.pad_w + int64_t{p.dil_h} * p.r + int64_t{p.dil_w} * p.s;
  if (reach > INT32_MAX / 4 || std::max(p.h, p.w) > INT32_MAX / 4) return "the padding, filter or image is too large";
  const double tiles = double(p.n) * double(ceil_div(p.p(), kStemRows)) * double(ceil_div(p.q(), kStemCols));
  if (tiles > INT32_MAX / 2) return "there are more than 2^30 tiles";
  if (double(StemPlan::height_of(p)) * p.w * p.c > INT32_MAX) return "the rows of a tile have more than 2^31 elements";
  return nullptr;
}

// Blocks of several tiles each share a multiprocessor: what counts is what all their tiles need of each of its parts,
// unless a block alone, which fills, multiplies and stores one after the other, takes longer.
inline double stem_cost(const Variant& v, const ConvProblem& p) {
  // Instructions of a warp for 32 runs of a patch, for 8 filters of four pixels a lane with scale, shift and relu, and
  // for 16 rows of 16 bytes of dy a lane: counted in what nvcc 13.0 makes of them for sm_90.
  constexpr double kFill = 75, kStore = 250, kLoadDy = 170;
  const bool wgrad = v.pass == Pass::kWgrad, half = v.arithmetic != Arithmetic::tf32;
  const MachineCode code = machine_code_of(v);
  const double taps = double(p.r) * p.s, size = double(dtype_size(p.dtype));
  const double runs = double(StemPlan::height_of(p)) * ceil_ratio(double(StemPlan::width_of(p)) + 3, 4);
  // Beside the steps, of issue slots (four warps have four schedulers) and of shared memory, where the stores of four
  // neighbouring pixels meet each bank four times.
  double issue = ceil_ratio(runs, kStemThreads) * kFill, shared = runs * size / 2;
  double tiles = double(p.n) * ceil_ratio(p.p(), kStemRows) * ceil_ratio(p.q(), kStemCols);
  double steps, products, extra = kBlockOverhead;
  if (wgrad) {
    const double channels = p.c < 4 ? 3 : 4, block_taps = v.block_n / channels;
    tiles *= ceil_ratio(p.k, v.block_m) * ceil_ratio(taps, block_taps);
    steps = kStemRows, issue += kLoadDy * v.block_m * size / 256, shared += v.block_m * size;
    // The first warp has a group of 8 taps more often than the others.
    products = kStemCols * v.block_m * 32 * channels * ceil_ratio(std::min(taps, block_taps), 32);
    const double slabs = static_cast<double>(v.workspace(p, 1));
    extra += kLaunch + 2 * slabs / (kProcessors * kCacheBytes);
  } else {
    tiles *= ceil_ratio(p.k, v.block_n);
    steps = ceil_ratio(taps, 4), issue += v.block_n / 32 * kStore, products = kStemPixels * v.block_n * 16.0;
  }
  const double multiply = steps * products / (half ? kHalfMma : kTf32Mma);
  const double tile = std::max({multiply, steps * code.issue + issue, steps * code.shared + shared});
  const double each = ceil_ratio(tiles, kProcessors), rounds = ceil_ratio(each, code.blocks);
  const double busy = std::max(each * tile, rounds * (multiply + issue + kBlockOverhead));
  return kLaunch + extra + std::max(traffic_cost(p), busy);
}

}  // namespace convext::cuda
