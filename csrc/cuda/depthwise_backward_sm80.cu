// Depthwise convolution, backward, both gradients in one pass over x and dy:
//
//   dx[n,h,w,c] = sum_{r,s} dy[n,p,q,c] * w[c,r,s]        dw[c,r,s] = sum_{n,h,w} dy[n,p,q,c] * x[n,h,w,c]
//   where p*stride_h = h + pad_h - r and q*stride_w = w + pad_w - s have whole solutions inside the output
//
// Both sums run over the same pairs of an input pixel and an output pixel, so one walk over the input pixels that loads
// the dy window around each serves both: x and dy are read once, dx is written once, 3 tensors of traffic where two
// kernels need 4. 36 FLOP for 6 bytes at 3x3 in bf16: memory decides; from 5x5 up the FMA units do.
//
// backward<T, VEC, R, STRIDE, FORM, DW>: multiplier 1, no dilation. A thread owns VEC channels and, at a time, a patch
//   of STRIDE x 4 input pixels that starts at a multiple of the stride, so that which taps meet which pixels is known
//   to the compiler:
//
//       x    | 0 1 2 3 |          stride 2, R = 3: pixel 0 meets taps 0 and 2, pixel 1 meets tap 1, ...
//       dy   | -1  0  1 |         columns of dy: (pixel - tap) / stride
//
//   A block walks over a contiguous range of tiles, so that halos hit the first-level cache, and keeps dw in registers
//   all the while: R*R*VEC accumulators, 72 of 255 registers at 3x3 with 8 channels, 100 at 5x5 with 4, 98 at 7x7 with
//   2. At the end each warp adds up by shuffles, the warps through shared memory, 8*lanes*VEC*4 B = 2 KiB, and the
//   block writes one fp32 slab; the slabs are added in fixed order. The number of blocks depends on the problem alone,
//   so results repeat to the bit anywhere.
//   window is NHWC; planes is NCHW, VEC = 1, neighbouring threads along a row, small planes side by side in a tile.
// backward_any<T, VEC, DW>: any size, stride, dilation, multiplier, memory order, and float64, in one pass too. Taps
//   are a loop at run time, so a thread's share of dw lies in shared memory: R*S*256*VEC*4 B, 72 KiB for a dilated 3x3
//   with 8 channels -> 2 blocks on 228 KiB. Larger filters take fewer channels a thread, and more taps than
//   kEntryBudget holds take further passes over x and dy. A thread does 4 pixels for each tap and access to its share.
#include <type_traits>

#include "tile/depthwise.h"
#include "tile/reduce_splits.h"

namespace convext::cuda {
namespace {

constexpr int kPatchW = 4;
constexpr int64_t kTargetBlocks = 2 * kProcessors;

template <int R, int STRIDE>
struct Patch {
  static_assert(kPatchW % STRIDE == 0, "a patch starts at a multiple of the stride");
  static constexpr int H = STRIDE, W = kPatchW;
  static constexpr int LOW = (R - 1) / STRIDE;  // columns of dy left of the patch's first
  static constexpr int COLS = LOW + (W - 1) / STRIDE + 1;
};

template <class T, int VEC, int R, int STRIDE, Form FORM, bool DW>
__global__ void __launch_bounds__(kDepthwiseThreads, 1)
    backward(ConvProblem problem, DepthwiseTile tile, int64_t tiles_per_split, Strides xs, Strides ys,
             const T* __restrict__ dy, const T* __restrict__ x, const T* __restrict__ w, T* __restrict__ dx,
             float* __restrict__ partial, bool vector_rows) {
  using Pt = Patch<R, STRIDE>;
  CONVEXT_SHARED_MEMORY(shared);
  const int32_t P = problem.p(), Q = problem.q(), C = problem.c;
  const int32_t pitch = tile.lanes * VEC;
  float* filters = reinterpret_cast<float*>(shared);  // (R*R, pitch)
  float* scratch = filters + R * R * pitch;           // (warps, pitch)

  const int32_t c_block = static_cast<int32_t>(blockIdx.x % tile.tiles_c) * pitch;
  const int32_t split = static_cast<int32_t>(blockIdx.x / tile.tiles_c);
  for (int32_t i = threadIdx.x; i < R * R * pitch; i += kDepthwiseThreads) {
    const int32_t channel = i / (R * R), tap = i % (R * R);
    const int32_t c = c_block + channel;
    filters[tap * pitch + channel] = dx && c < C ? to_accumulate(__ldg(w + int64_t{c} * (R * R) + tap)) : 0.0f;
  }
  __syncthreads();  // orders the filters before every thread's reads below

  const DepthwisePlace place(tile, FORM == Form::kNHWC);
  const int32_t c = c_block + place.lane * VEC;
  const float* my_filters = filters + place.lane * VEC;
  // With NCHW the distance of columns is known: 1.
  const int64_t x_step = FORM == Form::kNCHW ? 1 : xs.w, y_step = FORM == Form::kNCHW ? 1 : ys.w;

  float dw[DW ? R : 1][DW ? R : 1][VEC] = {};
  const int64_t first = split * tiles_per_split;
  const int64_t last = first + tiles_per_split < tile.pixel_tiles() ? first + tiles_per_split : tile.pixel_tiles();
  for (int64_t index = first; index < last; ++index) {
    const int32_t tile_w = static_cast<int32_t>(index % tile.tiles_w);
    const int32_t tile_h = static_cast<int32_t>(index / tile.tiles_w % tile.tiles_h);
    const int32_t n = static_cast<int32_t>(index / tile.tiles_w / tile.tiles_h) * tile.across_n + place.n;
    const int32_t p0 = (tile_h * tile.across_h + place.h) + problem.pad_h / STRIDE;  // of the first row
    const int32_t q0 = (tile_w * tile.across_w + place.w) * (Pt::W / STRIDE) + problem.pad_w / STRIDE;
    const int32_t h0 = p0 * STRIDE - problem.pad_h, w0 = q0 * STRIDE - problem.pad_w;
    if (c >= C || n >= problem.n || h0 >= problem.h || w0 >= problem.w) continue;
    const int64_t x_image = n * xs.n + c * xs.c, y_image = n * ys.n + c * ys.c;

#pragma unroll
    for (int i = 0; i < Pt::H; ++i) {
      const int32_t h = h0 + i;
      if (h < 0 || h >= problem.h) continue;
      const int64_t x_line = x_image + h * xs.h;
      Run<T, VEC> pixels[Pt::W];
      if constexpr (DW) {
#pragma unroll
        for (int j = 0; j < Pt::W; ++j) {
          const int32_t column = w0 + j;
          pixels[j] = column >= 0 && column < problem.w ? load_run<T, VEC>(x + x_line + column * x_step)
                                                        : zero_run<T, VEC>();
        }
      }
      float acc[Pt::W][VEC] = {};
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if ((i - r) % STRIDE != 0) continue;
        const int32_t p = p0 + (i - r) / STRIDE;
        if (p < 0 || p >= P) continue;
        const T* y_line = dy + y_image + p * ys.h;
        Run<T, VEC> window[Pt::COLS];
#pragma unroll
        for (int col = 0; col < Pt::COLS; ++col) {
          const int32_t q = q0 - Pt::LOW + col;
          window[col] = q >= 0 && q < Q ? load_run<T, VEC>(y_line + q * y_step) : zero_run<T, VEC>();
        }
#pragma unroll
        for (int s = 0; s < R; ++s) {
          float tap[VEC];
#pragma unroll
          for (int v = 0; v < VEC; ++v) tap[v] = my_filters[(r * R + s) * pitch + v];
#pragma unroll
          for (int j = 0; j < Pt::W; ++j) {
            if ((j - s) % STRIDE != 0) continue;
            const int col = (j - s) / STRIDE + Pt::LOW;
#pragma unroll
            for (int v = 0; v < VEC; ++v) {
              const float value = to_accumulate(window[col].v[v]);
              acc[j][v] += value * tap[v];
              if constexpr (DW) dw[r][s][v] += value * to_accumulate(pixels[j].v[v]);
            }
          }
        }
      }
      if (!dx) continue;
      if (FORM == Form::kNCHW && vector_rows) {
        float row[Pt::W];
#pragma unroll
        for (int j = 0; j < Pt::W; ++j) row[j] = acc[j][0];
        store_run<T, Pt::W>(dx + x_line + w0, row);
      } else {
#pragma unroll
        for (int j = 0; j < Pt::W; ++j) {
          const int32_t column = w0 + j;
          if (column >= 0 && column < problem.w) store_run<T, VEC>(dx + x_line + column * x_step, acc[j]);
        }
      }
    }
  }

  if constexpr (DW) {
    // Pixels that a warp has of one lane: they are added first, by shuffles.
    const int32_t nearest = FORM == Form::kNHWC ? tile.lanes : 1, group = FORM == Form::kNHWC ? 32 / tile.lanes : 32;
    const int32_t rows = kDepthwiseThreads / tile.lanes / group;
    float* slab = partial + int64_t{split} * C * (R * R);
#pragma unroll
    for (int tap = 0; tap < R * R; ++tap) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) {
        float sum = dw[tap / R][tap % R][v];
        for (int32_t distance = nearest; distance < 32; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
        if (place.pixel % group == 0) scratch[place.pixel / group * pitch + place.lane * VEC + v] = sum;
      }
      __syncthreads();  // orders the warps' shares before their sum
      for (int32_t channel = threadIdx.x; channel < pitch; channel += kDepthwiseThreads) {
        float sum = 0;
        for (int32_t i = 0; i < rows; ++i) sum += scratch[i * pitch + channel];
        if (c_block + channel < C) slab[int64_t{c_block + channel} * (R * R) + tap] = sum;
      }
      __syncthreads();  // orders the sum before the next tap's shares
    }
  }
}

// Channels of a run: as many as keep the accumulators of dw in registers.
template <class T, int R, Form FORM>
constexpr int kRun = FORM == Form::kNCHW ? 1 : R == 3 ? Vector<T>::kSize : R == 5 ? 4 : 2;

// A slab is written and read once, 8 bytes a weight; x, dy and dx are worth ten times that to a split, or more.
DepthwisePlan split_backward(const ConvProblem& p, const DepthwiseTile& tile, int64_t bytes) {
  const int64_t least_pixels = ceil_div(10 * 8 * int64_t{p.r} * p.s, 3 * bytes);
  return split_tiles(tile, kTargetBlocks, ceil_div(p.nhw(), least_pixels), p.is_dilated());
}

// Planes of a tile side by side, at least 32 threads each: a warp has one plane.
int32_t backward_plane_lanes(const ConvProblem& p, int64_t bytes) {
  return min_of(kDepthwiseThreads / 32, plane_lanes(p.c, int64_t{p.h} * p.w * bytes));
}

template <class T, Form FORM>
DepthwisePlan plan_of(const ConvProblem& p) {
  constexpr int64_t kBytes = sizeof(T);
  const int vec = p.r == 3 ? kRun<T, 3, FORM> : p.r == 5 ? kRun<T, 5, FORM> : kRun<T, 7, FORM>;
  const int32_t lanes = FORM == Form::kNHWC ? channel_lanes(p, vec * kBytes) : backward_plane_lanes(p, kBytes);
  const int32_t sector = FORM == Form::kNHWC ? 0 : 32 / kBytes;  // a tile's rows start and end within one
  // Patches start at a multiple of the stride: up to stride - 1 pixels before the image.
  const int32_t height = p.h + p.pad_h % p.stride_h, width = p.w + p.pad_w % p.stride_w;
  return split_backward(p, choose_depthwise_tile(p.n, height, width, p.c / vec, lanes, p.stride_h, kPatchW, p.r - 1,
                                              p.s - 1 + sector), kBytes);
}

template <class T, Form FORM>
const char* reject_backward(const ConvProblem& p) {
  if (const char* why = reject_unless_depthwise(p)) return why;
  if (p.k != p.c) return "its channel multiplier is not 1";
  const Layout layout = FORM == Form::kNHWC ? Layout::kNHWC : Layout::kNCHW;
  if (p.x_layout != layout || p.y_layout != layout) {
    return FORM == Form::kNHWC ? "it takes channels-last tensors alone" : "it takes contiguous tensors alone";
  }
  if (FORM == Form::kNHWC && p.c % Vector<T>::kSize) return "the number of channels is not a multiple of 16 bytes";
  if (p.is_dilated()) return "the filter is dilated";
  if (p.r != p.s || (p.r != 3 && p.r != 5 && p.r != 7)) return "the filter is not 3x3, 5x5 or 7x7";
  if (p.stride_h != p.stride_w || p.stride_h > 2) return "the stride is not 1 or 2";
  return nullptr;
}

template <class T, int R, int STRIDE, Form FORM, bool DW>
const char* launch_backward_of(const ConvProblem& p, const void* dy, const void* x, const void* w, void* dx,
                               void* partial, void* stream) {
  constexpr int VEC = kRun<T, R, FORM>;
  const DepthwisePlan plan = plan_of<T, FORM>(p);
  const int32_t pitch = plan.tile.lanes * VEC;
  const size_t shared = sizeof(float) * (R * R + (DW ? kDepthwiseThreads / 32 : 0)) * pitch;
  const bool vector_rows = FORM == Form::kNCHW && p.w % kPatchW == 0 && p.pad_w % STRIDE == 0;
  return launch_kernel(backward<T, VEC, R, STRIDE, FORM, DW>,
                       dim3(static_cast<unsigned>(plan.blocks())), dim3(kDepthwiseThreads), shared,
                       stream, p, plan.tile, plan.tiles_per_split, strides_of(p.x_layout, p.c, p.h, p.w),
                       strides_of(p.y_layout, p.k, p.p(), p.q()), static_cast<const T*>(dy), static_cast<const T*>(x),
                       static_cast<const T*>(w), static_cast<T*>(dx), static_cast<float*>(partial), vector_rows);
}

template <class T, Form FORM, bool DW>
const char* launch_backward(const ConvProblem& p, const void* dy, const void* x, const void* w, void* dx,
                            void* partial, void* stream) {
  if (p.stride_h == 1) {
    if (p.r == 3) return launch_backward_of<T, 3, 1, FORM, DW>(p, dy, x, w, dx, partial, stream);
    if (p.r == 5) return launch_backward_of<T, 5, 1, FORM, DW>(p, dy, x, w, dx, partial, stream);
    return launch_backward_of<T, 7, 1, FORM, DW>(p, dy, x, w, dx, partial, stream);
  }
  if (p.r == 3) return launch_backward_of<T, 3, 2, FORM, DW>(p, dy, x, w, dx, partial, stream);
  if (p.r == 5) return launch_backward_of<T, 5, 2, FORM, DW>(p, dy, x, w, dx, partial, stream);
  return launch_backward_of<T, 7, 2, FORM, DW>(p, dy, x, w, dx, partial, stream);
}

// ---- any shape

// Where tap `tap` of input position `i` falls in the output: p*stride = i + pad - tap*dil. -1 where it does not.
CONVEXT_DEVICE int32_t output_of(int32_t i, int32_t tap, const FastDiv& stride, int32_t pad, int32_t dil,
                                 int32_t size) {
  const int32_t shifted = i + pad - tap * dil;
  if (shifted < 0) return -1;
  int32_t position, rest;
  stride(static_cast<uint32_t>(shifted), position, rest);
  return rest == 0 && position < size ? position : -1;
}

// Entries of dw that belong to one input channel, multiplier*R*S of them: entry e is tap e % (R*S) of filter
// c*multiplier + e / (R*S). A launch computes those of [begin, end), and dx.
struct Entries {
  int32_t begin, end;
};

template <class T, int VEC, bool DW>
__global__ void __launch_bounds__(kDepthwiseThreads, 1)
    backward_any(ConvProblem problem, DepthwiseTile tile, int64_t tiles_per_split, Strides xs, Strides ys,
                 FastDiv stride_h, FastDiv stride_w, Entries entries, const T* __restrict__ dy,
                 const T* __restrict__ x, const T* __restrict__ w, T* __restrict__ dx,
                 accumulate_t<T>* __restrict__ partial) {
  using Acc = accumulate_t<T>;
  CONVEXT_SHARED_MEMORY(shared);
  Acc* shares = reinterpret_cast<Acc*>(shared);  // (entries, VEC, threads): of dw
  const int32_t P = problem.p(), Q = problem.q(), C = problem.c;
  const int32_t multiplier = problem.k / C, taps = problem.r * problem.s, pitch = tile.lanes * VEC;
  const int32_t c_block = static_cast<int32_t>(blockIdx.x % tile.tiles_c) * pitch;
  const int32_t split = static_cast<int32_t>(blockIdx.x / tile.tiles_c);
  const bool channels_last = problem.x_layout == Layout::kNHWC;
  const DepthwisePlace place(tile, channels_last);
  const int32_t c = c_block + place.lane * VEC;
  const auto share = [&](int32_t entry, int v) -> Acc& {
    return shares[((entry - entries.begin) * VEC + v) * kDepthwiseThreads + threadIdx.x];
  };
  if constexpr (DW) {
    for (int32_t e = entries.begin; e < entries.end; ++e) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) share(e, v) = 0;
    }
  }
  // (R*S, pitch), for whole vectors
  Acc* filters = shares + (DW ? (entries.end - entries.begin) * VEC * kDepthwiseThreads : 0);
  if constexpr (VEC > 1) {
    for (int32_t i = threadIdx.x; i < taps * pitch; i += kDepthwiseThreads) {
      const int32_t tap = i / pitch, column = i % pitch;
      const bool wanted = dx && c_block + column < C;
      filters[i] = wanted ? to_accumulate(__ldg(w + int64_t{c_block + column} * taps + tap)) : Acc(0);
    }
    __syncthreads();  // orders the filters before every thread's reads below
  }

  const int64_t first = split * tiles_per_split;
  const int64_t last = first + tiles_per_split < tile.pixel_tiles() ? first + tiles_per_split : tile.pixel_tiles();
  for (int64_t index = first; index < last; ++index) {
    const int32_t tile_w = static_cast<int32_t>(index % tile.tiles_w);
    const int32_t h = static_cast<int32_t>(index / tile.tiles_w % tile.tiles_h) * tile.across_h + place.h;
    const int32_t n = static_cast<int32_t>(index / tile.tiles_w / tile.tiles_h) * tile.across_n + place.n;
    if (c >= C || n >= problem.n || h >= problem.h) continue;
    // A thread's pixels lie across_w apart, so that neighbouring threads have neighbouring pixels.
    const auto column_of = [&](int j) { return (tile_w * kPatchW + j) * tile.across_w + place.w; };
    const int64_t x_line = n * xs.n + h * xs.h + c * xs.c;
    Acc pixels[kPatchW][VEC] = {}, acc[kPatchW][VEC] = {};
    if constexpr (DW) {
#pragma unroll
      for (int j = 0; j < kPatchW; ++j) {
        if (column_of(j) >= problem.w) continue;
        const Run<T, VEC> run = load_run<T, VEC>(x + x_line + column_of(j) * xs.w);
#pragma unroll
        for (int v = 0; v < VEC; ++v) pixels[j][v] = to_accumulate(run.v[v]);
      }
    }
    for (int32_t m = 0; m < multiplier; ++m) {
      const int32_t k = VEC == 1 ? c * multiplier + m : c;  // whole vectors have multiplier 1
      for (int32_t r = 0; r < problem.r; ++r) {
        const int32_t p = output_of(h, r, stride_h, problem.pad_h, problem.dil_h, P);
        if (p < 0) continue;
        const T* y_line = dy + n * ys.n + p * ys.h + k * ys.c;
        for (int32_t s = 0; s < problem.s; ++s) {
          const int32_t tap = r * problem.s + s, entry = m * taps + tap;
          const bool counts = DW && entry >= entries.begin && entry < entries.end;
          if (!dx && !counts) continue;
          Acc weight[VEC] = {}, sum[VEC] = {};
#pragma unroll
          for (int v = 0; v < VEC; ++v) {
            if (VEC > 1) weight[v] = filters[tap * pitch + place.lane * VEC + v];
            else if (dx) weight[v] = to_accumulate(__ldg(w + int64_t{k} * taps + tap));
          }
#pragma unroll
          for (int j = 0; j < kPatchW; ++j) {
            const int32_t q = column_of(j) < problem.w
                                  ? output_of(column_of(j), s, stride_w, problem.pad_w, problem.dil_w, Q) : -1;
            if (q < 0) continue;
            const Run<T, VEC> run = load_run<T, VEC>(y_line + q * ys.w);
#pragma unroll
            for (int v = 0; v < VEC; ++v) {
              const Acc value = to_accumulate(run.v[v]);
              acc[j][v] += value * weight[v];
              sum[v] += value * pixels[j][v];
            }
          }
          if (counts) {
#pragma unroll
            for (int v = 0; v < VEC; ++v) share(entry, v) += sum[v];
          }
        }
      }
    }
    if (!dx) continue;
#pragma unroll
    for (int j = 0; j < kPatchW; ++j) {
      if (column_of(j) < problem.w) store_run<T, VEC>(dx + x_line + column_of(j) * xs.w, acc[j]);
    }
  }

  if constexpr (DW) {
    __syncthreads();  // orders the threads' shares before their sum
    const int32_t pixels = kDepthwiseThreads / tile.lanes;
    const int32_t next_pixel = channels_last ? tile.lanes : 1, next_lane = channels_last ? 1 : pixels;
    for (int32_t i = threadIdx.x; i < (entries.end - entries.begin) * pitch; i += kDepthwiseThreads) {
      const int32_t entry = i / pitch, column = i % pitch;  // counted from the first of this launch
      if (c_block + column >= C) continue;
      const Acc* row = shares + (entry * VEC + column % VEC) * kDepthwiseThreads + column / VEC * next_lane;
      Acc sum = 0;
      for (int32_t pixel = 0; pixel < pixels; ++pixel) sum += row[pixel * next_pixel];
      const int32_t m = (entries.begin + entry) / taps, tap = (entries.begin + entry) % taps;
      const int64_t k = int64_t{c_block + column} * multiplier + m;
      partial[(int64_t{split} * problem.k + k) * taps + tap] = sum;
    }
  }
}

// Shared memory that every GPU from compute capability 8.0 on lets a block ask for, nearly.
constexpr int64_t kEntryBudget = 96 * 1024;

// What an entry takes of it: the threads' shares of dw, and for whole vectors the filters of the block's channels.
template <class T, int VEC>
constexpr int64_t entry_bytes(bool dw) {
  return (dw ? kDepthwiseThreads * VEC : 0) * static_cast<int64_t>(sizeof(accumulate_t<T>)) +
         (VEC > 1 ? 128 / sizeof(T) * sizeof(accumulate_t<T>) : 0);
}

// Calls f(integral constant VEC): as many channels a thread as memory order, multiplier and the taps allow.
template <class T, class F>
auto with_channels(const ConvProblem& p, bool dw, F&& f) {
  const int64_t entries = int64_t{p.r} * p.s;
  const bool channels_last = p.x_layout == Layout::kNHWC && p.y_layout == Layout::kNHWC && p.k == p.c;
  if constexpr (sizeof(T) <= 4) {
    constexpr int VEC = Vector<T>::kSize;
    if (channels_last && p.c % VEC == 0 && entries * entry_bytes<T, VEC>(dw) <= kEntryBudget) {
      return f(std::integral_constant<int, VEC>{});
    }
  }
  if constexpr (sizeof(T) == 2) {
    if (channels_last && p.c % 2 == 0 && entries * entry_bytes<T, 2>(dw) <= kEntryBudget) {
      return f(std::integral_constant<int, 2>{});
    }
  }
  return f(std::integral_constant<int, 1>{});
}

template <class T>
DepthwisePlan plan_any(const ConvProblem& p, int vec) {
  constexpr int64_t kBytes = sizeof(T);
  const bool channels_last = p.x_layout == Layout::kNHWC;
  const int32_t lanes = channels_last ? channel_lanes(p, vec * kBytes) : backward_plane_lanes(p, kBytes);
  const int32_t sector = channels_last ? 0 : 32 / kBytes;
  return split_backward(p, choose_depthwise_tile(p.n, p.h, p.w, static_cast<int32_t>(ceil_div(p.c, vec)), lanes, 1,
                                              kPatchW, p.dil_h * (p.r - 1), p.dil_w * (p.s - 1) + sector), kBytes);
}

const char* reject_any(const ConvProblem& p) {
  if (const char* why = reject_unless_depthwise(p)) return why;
  if (int64_t{p.r} * p.s * (p.k / p.c) > INT32_MAX / 2) return "one filter is too large";
  return nullptr;
}

template <class T, bool DW>
const char* launch_any(const ConvProblem& p, const void* dy, const void* x, const void* w, void* dx, void* partial,
                       void* stream) {
  return with_channels<T>(p, DW, [&](auto channels) -> const char* {
    constexpr int VEC = decltype(channels)::value;
    const DepthwisePlan plan = plan_any<T>(p, VEC);
    const int32_t entries = p.r * p.s * (p.k / p.c);
    const int32_t most = DW && VEC == 1 ? static_cast<int32_t>(kEntryBudget / entry_bytes<T, 1>(true)) : entries;
    int32_t begin = 0;
    do {  // once, unless the filter is too large for the budget
      const Entries part{begin, min_of(begin + most, entries)};
      const char* error = launch_kernel(
          backward_any<T, VEC, DW>, dim3(static_cast<unsigned>(plan.blocks())),
          dim3(kDepthwiseThreads), static_cast<size_t>((part.end - part.begin) * entry_bytes<T, VEC>(DW)), stream, p,
          plan.tile, plan.tiles_per_split, strides_of(p.x_layout, p.c, p.h, p.w),
          strides_of(p.y_layout, p.k, p.p(), p.q()), FastDiv(p.stride_h), FastDiv(p.stride_w), part,
          static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<const T*>(w),
          static_cast<T*>(begin == 0 ? dx : nullptr), static_cast<accumulate_t<T>*>(partial));
      if (error) return error;
      begin = part.end;
    } while (begin < entries);
    return nullptr;
  });
}

// ---- the two families as variants

template <class T, Form FORM>
struct Special {
  static constexpr Layouts LAYOUTS = FORM == Form::kNHWC ? Layouts::kNHWCOnly : Layouts::kAny;
  static const char* reject(const ConvProblem& p) { return reject_backward<T, FORM>(p); }
  static int64_t splits(const ConvProblem& p) { return plan_of<T, FORM>(p).splits; }
  template <bool DW, class... Arguments>
  static const char* launch(Arguments... arguments) { return launch_backward<T, FORM, DW>(arguments...); }
};
template <class T>
struct General {
  static constexpr Layouts LAYOUTS = Layouts::kAny;
  static const char* reject(const ConvProblem& p) { return reject_any(p); }
  static int64_t splits(const ConvProblem& p) {
    return with_channels<T>(p, true, [&](auto channels) { return plan_any<T>(p, decltype(channels)::value).splits; });
  }
  template <bool DW, class... Arguments>
  static const char* launch(Arguments... arguments) { return launch_any<T, DW>(arguments...); }
};

template <class T, class FAMILY>
constexpr Variant dgrad_variant(const char* name) {
  return {.name = name, .algo = "depthwise", .device = Device::kCUDA, .pass = Pass::kDgrad, .dtype = DTypeOf<T>::value,
          .isa = Isa::kSM80, .layouts = FAMILY::LAYOUTS, .reject = FAMILY::reject,
          .launch = [](const ConvProblem& p, const LaunchArgs& args) -> const char* {
            const void* none = nullptr;
            void* nowhere = nullptr;
            return FAMILY::template launch<false>(p, args.a, none, args.b, args.out, nowhere, args.stream);
          }};
}

template <class T, class FAMILY>
constexpr Variant wgrad_variant(const char* name) {
  return {.name = name, .algo = "depthwise", .device = Device::kCUDA, .pass = Pass::kWgrad, .dtype = DTypeOf<T>::value,
          .isa = Isa::kSM80, .layouts = FAMILY::LAYOUTS, .reject = FAMILY::reject,
          .workspace = [](const ConvProblem& p, int32_t) -> int64_t {
            return FAMILY::splits(p) * p.w_size() * static_cast<int64_t>(sizeof(accumulate_t<T>));
          },
          .launch = [](const ConvProblem& p, const LaunchArgs& args) -> const char* {
            const char* error = FAMILY::template launch<true>(p, args.a, args.b, args.w, args.dx, args.workspace,
                                                              args.stream);
            if (error) return error;
            return launch_reduce_splits<T>(args.workspace, args.out, p.w_size(),
                                           static_cast<int32_t>(FAMILY::splits(p)), args.stream);
          },
          .wgrad_writes_dx = true};
}

}  // namespace
}  // namespace convext::cuda

namespace convext {
#define CONVEXT_DEPTHWISE(T, dtype, form, ...)                                                      \
  extern const Variant dgrad_depthwise_##dtype##_##form##_sm80 =                                    \
      cuda::dgrad_variant<T, cuda::__VA_ARGS__>("dgrad_depthwise_" #dtype "_" #form "_sm80");       \
  extern const Variant wgrad_depthwise_##dtype##_##form##_sm80 =                                    \
      cuda::wgrad_variant<T, cuda::__VA_ARGS__>("wgrad_depthwise_" #dtype "_" #form "_sm80");
#define CONVEXT_DEPTHWISE_FORMS(T, dtype)                                        \
  CONVEXT_DEPTHWISE(T, dtype, window, Special<T, cuda::Form::kNHWC>)             \
  CONVEXT_DEPTHWISE(T, dtype, planes, Special<T, cuda::Form::kNCHW>)             \
  CONVEXT_DEPTHWISE(T, dtype, any, General<T>)
CONVEXT_DEPTHWISE_FORMS(cuda::bf16, bf16)
CONVEXT_DEPTHWISE_FORMS(cuda::fp16, f16)
CONVEXT_DEPTHWISE_FORMS(float, f32)
CONVEXT_DEPTHWISE(double, f64, any, General<double>)
}  // namespace convext
