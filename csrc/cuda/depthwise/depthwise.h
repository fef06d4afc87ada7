// What the depthwise kernels share: the shape of a block's tile, and where in it a thread stands.
#pragma once
#include <type_traits>

#include "cuda/cost.h"
#include "cuda/tile/run.h"
#include "cuda/tile/strides.h"

namespace convext::cuda {

constexpr int kDepthwiseThreads = 256;

// How the 256 threads of a block cover channels and pixels. A thread owns one run of `vec` channels and a patch of
// patch_h x patch_w pixels; every count is a power of two.
//
//             patch_w
//            +---+---+---+---+
//    patch_h |t0 |t1 |t2 |t3 |   across_w = 4, across_h = 2, times across_n images
//            +---+---+---+---+
//            |t4 |t5 |t6 |t7 |   times `lanes` neighbouring channel runs, the fastest index: 128 bytes in a row
//            +---+---+---+---+
struct DepthwiseTile {
  int32_t lanes, across_w, across_h, across_n;
  int32_t tiles_c, tiles_w, tiles_h, tiles_n;
  CONVEXT_HD constexpr int64_t pixel_tiles() const { return int64_t{tiles_w} * tiles_h * tiles_n; }
};

// The tile that covers images of height x width with the least memory traffic, halos of `halo_h` x `halo_w` counted.
inline DepthwiseTile choose_depthwise_tile(int32_t n, int32_t height, int32_t width, int32_t runs, int32_t max_lanes,
                                           int32_t patch_h, int32_t patch_w, int32_t halo_h, int32_t halo_w) {
  DepthwiseTile best{};
  int32_t lanes = 1;
  while (lanes < max_lanes && lanes * 2 <= runs) lanes *= 2;
  double best_traffic = 0;
  const int32_t pixels = kDepthwiseThreads / lanes;
  for (int32_t across_w = 1; across_w <= pixels; across_w *= 2) {
    for (int32_t across_h = 1; across_w * across_h <= pixels; across_h *= 2) {
      DepthwiseTile t{lanes, across_w, across_h, pixels / (across_w * across_h), 0, 0, 0, 0};
      const int32_t tile_w = across_w * patch_w, tile_h = across_h * patch_h;
      t.tiles_c = static_cast<int32_t>(ceil_div(runs, lanes));
      t.tiles_w = static_cast<int32_t>(ceil_div(width, tile_w));
      t.tiles_h = static_cast<int32_t>(ceil_div(height, tile_h));
      t.tiles_n = static_cast<int32_t>(ceil_div(n, t.across_n));
      // What the tiles read: every border between two of them is read by both.
      const double read = (height + (t.tiles_h - 1.0) * halo_h) * (width + (t.tiles_w - 1.0) * halo_w) * n;
      const double padded = double(t.tiles_w) * tile_w * t.tiles_h * tile_h * t.tiles_n * t.across_n;
      // An idle thread loads nothing, but holds a place.
      const double traffic = read + double(n) * height * width + 0.125 * padded;
      if (best_traffic == 0 || traffic < best_traffic) best_traffic = traffic, best = t;
    }
  }
  return best;
}

// Which tiles a block walks over: `tiles_per_split` neighbouring ones, so that halos hit the first-level cache, filters
// are loaded once, and what the block sums up is written once. It depends on the problem alone, so results repeat to
// the bit anywhere.
struct DepthwisePlan {
  DepthwiseTile tile;
  int64_t splits, tiles_per_split;
  constexpr int64_t blocks() const { return splits * tile.tiles_c; }
};

// Memory decides for `window` and `planes`, instructions for `any`, which reads each operand about twice: estimates.
constexpr double kAnyInstructions = 8;  // for a multiply-add
constexpr double kAnyReadings = 2;

inline double depthwise_cost(const Variant&, const ConvProblem& p) { return kLaunch + traffic_cost(p); }
inline double any_depthwise_cost(const Variant&, const ConvProblem& p) {
  const double instructions = p.flops() / 2 * kAnyInstructions / (kProcessors * kFp32Fma);
  return kLaunch + std::max(kAnyReadings * traffic_cost(p), instructions);
}

// `blocks` blocks, if there are tiles enough, in at most `most_splits` splits. `whole_images` where taps reach so far
// that parts of an image would each read most of it: a block takes whole ones, unless that leaves processors idle.
inline DepthwisePlan split_tiles(const DepthwiseTile& tile, int64_t blocks, int64_t most_splits, bool whole_images) {
  const int64_t tiles = tile.pixel_tiles(), image = int64_t{tile.tiles_w} * tile.tiles_h;
  const int64_t most = most_splits < tiles ? most_splits : tiles, wanted = ceil_div(blocks, tile.tiles_c);
  int64_t per_split = ceil_div(tiles, wanted < most ? wanted : most);
  if (whole_images && int64_t{tile.tiles_c} * tile.tiles_n >= kProcessors) {
    per_split = ceil_div(per_split, image) * image;
  }
  return {tile, ceil_div(tiles, per_split), per_split};
}

// Channel runs of `run_bytes` side by side in an NHWC tile: 128 bytes of a pixel; where taps reach far, so many that a
// whole image of them stays in the first-level cache, and a sector at least.
inline int32_t channel_lanes(const ConvProblem& p, int64_t run_bytes) {
  int64_t lanes = ceil_div(128, run_bytes);
  if (p.is_dilated()) {
    while (lanes * run_bytes > 32 && int64_t{p.h} * p.w * lanes * run_bytes > 48 * 1024) lanes /= 2;
  }
  return min_of(32, static_cast<int32_t>(lanes));
}

// How a kernel walks over memory: NHWC, neighbouring threads along channels; NCHW, along a row; or as the problem says.
enum class Form { kNHWC, kNCHW, kAny };

template <Form FORM>
CONVEXT_DEVICE bool lanes_innermost(Layout layout) {
  return FORM == Form::kNHWC || (FORM == Form::kAny && layout == Layout::kNHWC);
}

// A thread's place in its tile: its channel run, and its patch.
struct DepthwisePlace {
  int32_t lane, pixel, w, h, n;  // pixel counts the patches of the tile

  CONVEXT_DEVICE DepthwisePlace(const DepthwiseTile& tile, bool lanes_innermost) {
    const int32_t t = threadIdx.x, pixels = kDepthwiseThreads / tile.lanes;
    lane = lanes_innermost ? t % tile.lanes : t / pixels;
    pixel = lanes_innermost ? t / tile.lanes : t % pixels;
    w = pixel % tile.across_w;
    h = pixel / tile.across_w % tile.across_h;
    n = pixel / tile.across_w / tile.across_h;
  }
};

// The tiles that a block walks over, one after the other without a division: column, row and image of the present one,
// counted in tiles, and how many are left.
struct DepthwiseWalk {
  int32_t w, h, n, left;

  CONVEXT_DEVICE DepthwiseWalk(const DepthwiseTile& tile, int64_t split, int64_t tiles_per_split) {
    const int64_t first = split * tiles_per_split, all = tile.pixel_tiles();
    w = static_cast<int32_t>(first % tile.tiles_w);
    h = static_cast<int32_t>(first / tile.tiles_w % tile.tiles_h);
    n = static_cast<int32_t>(first / tile.tiles_w / tile.tiles_h);
    left = static_cast<int32_t>(tiles_per_split < all - first ? tiles_per_split : all - first);
  }

  CONVEXT_DEVICE void next(const DepthwiseTile& tile) {
    --left;
    if (++w < tile.tiles_w) return;
    w = 0;
    if (++h < tile.tiles_h) return;
    h = 0, ++n;
  }
};

// A thread's patch in a tile: its row and column, counted in patches, and its image.
struct DepthwisePatch {
  int32_t row, column, n;

  CONVEXT_DEVICE DepthwisePatch(const DepthwiseTile& tile, const DepthwisePlace& place, const DepthwiseWalk& walk)
      : row(walk.h * tile.across_h + place.h),
        column(walk.w * tile.across_w + place.w),
        n(walk.n * tile.across_n + place.n) {}
};

// Where in a row of float the weight of a block's channel `channel` lies: 16 bytes are left free after every 128, so
// that eight threads which load 16 bytes each of 8 channels meet different banks.
CONVEXT_HD constexpr int32_t weight_place(int32_t channel) { return channel + channel / 32 * 4; }

// N weights of neighbouring channels, 16 bytes a load.
template <int N>
CONVEXT_DEVICE void load_weights(const float* from, float (&into)[N]) {
  constexpr int CHUNK = N < 4 ? N : 4;
#pragma unroll
  for (int i = 0; i < N; i += CHUNK) {
    const Run<float, CHUNK> run = load_shared_run<float, CHUNK>(from + i);
#pragma unroll
    for (int j = 0; j < CHUNK; ++j) into[i + j] = run.v[j];
  }
}

// The filters of a block's channels into shared memory, (taps, weight_place(columns)), from channel `first` on: zeros
// past the last one.
template <class T>
CONVEXT_DEVICE void load_filters(accumulate_t<T>* filters, const T* w, int32_t taps, int32_t columns, int32_t first,
                                 int32_t channels) {
  const int32_t pitch = weight_place(columns);
  for (int32_t i = threadIdx.x; i < taps * columns; i += kDepthwiseThreads) {
    const int32_t channel = i / taps, tap = i % taps, k = first + channel;
    filters[tap * pitch + weight_place(channel)] =
        k < channels ? to_accumulate(__ldg(w + int64_t{k} * taps + tap)) : accumulate_t<T>(0);
  }
  __syncthreads();  // orders the filters before every thread's reads
}

// Channels that a tile of NCHW planes spans: small planes side by side, so that what a block reads is 2 KiB in a row.
inline int32_t plane_lanes(int64_t channels, int64_t plane_bytes) {
  int32_t lanes = 1;
  while (lanes < 16 && lanes * 2 <= channels && lanes * plane_bytes < 2048) lanes *= 2;
  return lanes;
}

// Calls f(R, STRIDE), two integral constants: 3, 5 or 7, and 1 or 2.
template <class F>
auto with_square_filter(const ConvProblem& p, F&& f) {
  const auto with = [&](auto stride) {
    if (p.r == 3) return f(std::integral_constant<int, 3>{}, stride);
    if (p.r == 5) return f(std::integral_constant<int, 5>{}, stride);
    return f(std::integral_constant<int, 7>{}, stride);
  };
  return p.stride_h == 1 ? with(std::integral_constant<int, 1>{}) : with(std::integral_constant<int, 2>{});
}

inline const char* reject_unless_depthwise(const ConvProblem& p) {
  return p.is_depthwise() ? nullptr : "it serves depthwise convolutions alone: groups = C, and K a multiple of C";
}

}  // namespace convext::cuda
