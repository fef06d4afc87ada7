// What the depthwise kernels share: the shape of a block's tile, and a vector of neighbouring channels.
#pragma once
#include "strides.h"

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

// N neighbouring elements, loaded and stored in one instruction where they are 4, 8 or 16 bytes.
template <class T, int N>
struct alignas(N * sizeof(T)) Run {
  T v[N];
};

template <class T, int N>
CONVEXT_DEVICE Run<T, N> load_run(const T* p) {
  Run<T, N> out;
  if constexpr (sizeof(out) == 16) {
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(p));
    memcpy(&out, &raw, sizeof raw);
  } else if constexpr (sizeof(out) == 8) {
    const uint2 raw = __ldg(reinterpret_cast<const uint2*>(p));
    memcpy(&out, &raw, sizeof raw);
  } else {
    static_assert(sizeof(out) == 4, "4, 8 or 16 bytes");
    const unsigned raw = __ldg(reinterpret_cast<const unsigned*>(p));
    memcpy(&out, &raw, sizeof raw);
  }
  return out;
}

template <class T, int N>
CONVEXT_DEVICE Run<T, N> zero_run() {
  Run<T, N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) out.v[i] = from_accumulate<T>(0);
  return out;
}

template <class T, int N>
CONVEXT_DEVICE void store_run(T* p, const accumulate_t<T> (&v)[N]) {
  Run<T, N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) out.v[i] = from_accumulate<T>(v[i]);
  if constexpr (sizeof(out) == 16) {
    uint4 raw;
    memcpy(&raw, &out, sizeof raw);
    *reinterpret_cast<uint4*>(p) = raw;
  } else if constexpr (sizeof(out) == 8) {
    uint2 raw;
    memcpy(&raw, &out, sizeof raw);
    *reinterpret_cast<uint2*>(p) = raw;
  } else {
    static_assert(sizeof(out) == 4, "4, 8 or 16 bytes");
    unsigned raw;
    memcpy(&raw, &out, sizeof raw);
    *reinterpret_cast<unsigned*>(p) = raw;
  }
}

inline const char* reject_unless_depthwise(const ConvProblem& p) {
  return p.is_depthwise() ? nullptr : "it serves depthwise convolutions alone: groups = C, and K a multiple of C";
}

}  // namespace convext::cuda
