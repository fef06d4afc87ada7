// Depthwise convolution, backward, both gradients in one pass over x and dy:
//
//   dx[n,h,w,c] = sum_{r,s} dy[n,p,q,c] * w[c,r,s]        dw[c,r,s] = sum_{n,h,w} dy[n,p,q,c] * x[n,h,w,c]
//   where p*stride_h = h + pad_h - r and q*stride_w = w + pad_w - s have whole solutions inside the output
//
// Both sums run over the same pairs of an input pixel and an output pixel, so one walk over the input pixels that loads
// the dy window around each serves both: x and dy are read once, dx is written once, 3 tensors of traffic where two
// kernels need 4. 36 FLOP for 6 bytes at 3x3 in bf16: memory decides; from 5x5 up the FMA units do.
//
// backward<T, VEC, R, STRIDE, DW>: NHWC, multiplier 1. A thread owns VEC channels and, at a time, a patch of STRIDE x 4
//   input pixels that starts at a multiple of the stride, so that which taps meet which pixels is known to the
//   compiler:
//
//       x    | 0 1 2 3 |          stride 2, R = 3: pixel 0 meets taps 0 and 2, pixel 1 meets tap 1, ...
//       dy   | -1  0  1 |         columns of dy: (pixel - tap) / stride
//
//   A block walks over a contiguous range of tiles, so that halos hit the first-level cache, and keeps dw in registers
//   all the while: R*R*VEC accumulators, 72 of 255 registers at 3x3 with 8 channels, 100 at 5x5 with 4, 98 at 7x7 with
//   2. At the end the block's threads add up through shared memory, 256*VEC*4 B = 8 KiB, and write one fp32 slab; the
//   slabs are added in fixed order. The number of blocks depends on the problem alone, so results repeat to the bit
//   anywhere.
// dgrad_any<T>, wgrad_any<T>: either memory order, any size, stride, dilation, multiplier, and float64.
#include "tile/depthwise.h"
#include "tile/reduce_splits.h"

namespace convext::cuda {
namespace {

constexpr int kPatchW = 4;
constexpr int64_t kTargetBlocks = 2 * 132;  // two blocks for each multiprocessor of the largest GPU in use

template <int R, int STRIDE>
struct Patch {
  static_assert(kPatchW % STRIDE == 0, "a patch starts at a multiple of the stride");
  static constexpr int H = STRIDE, W = kPatchW;
  static constexpr int LOW = (R - 1) / STRIDE;  // columns of dy left of the patch's first
  static constexpr int COLS = LOW + (W - 1) / STRIDE + 1;
};

template <class T, int VEC, int R, int STRIDE, bool DW>
__global__ void __launch_bounds__(kDepthwiseThreads, 1)
    backward(ConvProblem problem, DepthwiseTile tile, int64_t tiles_per_split, const T* __restrict__ dy,
             const T* __restrict__ x, const T* __restrict__ w, T* __restrict__ dx, float* __restrict__ partial) {
  using Pt = Patch<R, STRIDE>;
  CONVEXT_SHARED_MEMORY(shared);
  const int32_t P = problem.p(), Q = problem.q(), C = problem.c;
  const int32_t pitch = tile.lanes * VEC;
  float* filters = reinterpret_cast<float*>(shared);  // (R*R, pitch)
  float* scratch = filters + R * R * pitch;           // (pixels of a tile, pitch)

  const int32_t c_block = static_cast<int32_t>(blockIdx.x % tile.tiles_c) * pitch;
  const int32_t split = static_cast<int32_t>(blockIdx.x / tile.tiles_c);
  for (int32_t i = threadIdx.x; i < R * R * pitch; i += kDepthwiseThreads) {
    const int32_t channel = i / (R * R), tap = i % (R * R);
    const int32_t c = c_block + channel;
    filters[tap * pitch + channel] = dx && c < C ? to_accumulate(__ldg(w + int64_t{c} * (R * R) + tap)) : 0.0f;
  }
  __syncthreads();  // orders the filters before every thread's reads below

  int32_t t = threadIdx.x;
  const int32_t lane = t % tile.lanes;
  t /= tile.lanes;
  const int32_t pixel = t;
  const int32_t across_w = t % tile.across_w;
  t /= tile.across_w;
  const int32_t across_h = t % tile.across_h;
  const int32_t across_n = t / tile.across_h;
  const int32_t c = c_block + lane * VEC;
  const float* my_filters = filters + lane * VEC;

  float dw[DW ? R : 1][DW ? R : 1][VEC] = {};
  const int64_t first = split * tiles_per_split;
  const int64_t last = first + tiles_per_split < tile.pixel_tiles() ? first + tiles_per_split : tile.pixel_tiles();
  for (int64_t index = first; index < last; ++index) {
    const int32_t tile_w = static_cast<int32_t>(index % tile.tiles_w);
    const int32_t tile_h = static_cast<int32_t>(index / tile.tiles_w % tile.tiles_h);
    const int32_t n = static_cast<int32_t>(index / tile.tiles_w / tile.tiles_h) * tile.across_n + across_n;
    const int32_t p0 = (tile_h * tile.across_h + across_h) + problem.pad_h / STRIDE;            // of the first row
    const int32_t q0 = (tile_w * tile.across_w + across_w) * (Pt::W / STRIDE) + problem.pad_w / STRIDE;
    const int32_t h0 = p0 * STRIDE - problem.pad_h, w0 = q0 * STRIDE - problem.pad_w;
    if (c >= C || n >= problem.n || h0 >= problem.h || w0 >= problem.w) continue;
    const int64_t x_image = int64_t{n} * problem.h * problem.w * C + c;
    const int64_t y_image = int64_t{n} * P * Q * C + c;

#pragma unroll
    for (int i = 0; i < Pt::H; ++i) {
      const int32_t h = h0 + i;
      if (h < 0 || h >= problem.h) continue;
      const int64_t x_line = x_image + int64_t{h} * problem.w * C;
      Run<T, VEC> pixels[Pt::W];
      if constexpr (DW) {
#pragma unroll
        for (int j = 0; j < Pt::W; ++j) {
          const int32_t column = w0 + j;
          pixels[j] = column >= 0 && column < problem.w ? load_run<T, VEC>(x + x_line + int64_t{column} * C)
                                                        : zero_run<T, VEC>();
        }
      }
      float acc[Pt::W][VEC] = {};
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if ((i - r) % STRIDE != 0) continue;
        const int32_t p = p0 + (i - r) / STRIDE;
        if (p < 0 || p >= P) continue;
        const T* y_line = dy + y_image + int64_t{p} * Q * C;
        Run<T, VEC> window[Pt::COLS];
#pragma unroll
        for (int col = 0; col < Pt::COLS; ++col) {
          const int32_t q = q0 - Pt::LOW + col;
          window[col] = q >= 0 && q < Q ? load_run<T, VEC>(y_line + int64_t{q} * C) : zero_run<T, VEC>();
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
      if (dx) {
#pragma unroll
        for (int j = 0; j < Pt::W; ++j) {
          const int32_t column = w0 + j;
          if (column >= 0 && column < problem.w) store_run<T, VEC>(dx + x_line + int64_t{column} * C, acc[j]);
        }
      }
    }
  }

  if constexpr (DW) {
    const int32_t pixel_threads = kDepthwiseThreads / tile.lanes;
    float* slab = partial + int64_t{split} * C * (R * R);
#pragma unroll
    for (int tap = 0; tap < R * R; ++tap) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) scratch[pixel * pitch + lane * VEC + v] = dw[tap / R][tap % R][v];
      __syncthreads();  // orders the threads' shares before their sum
      for (int32_t channel = threadIdx.x; channel < pitch; channel += kDepthwiseThreads) {
        float sum = 0;
        for (int32_t i = 0; i < pixel_threads; ++i) sum += scratch[i * pitch + channel];
        if (c_block + channel < C) slab[int64_t{c_block + channel} * (R * R) + tap] = sum;
      }
      __syncthreads();  // orders the sum before the next tap's shares
    }
  }
}

// Channels of a run: as many as keep the accumulators of dw in registers.
template <class T, int R>
constexpr int kRun = R == 3 ? Vector<T>::kSize : R == 5 ? 4 : 2;

// The tiles and splits of one problem.
struct BackwardPlan {
  DepthwiseTile tile;
  int64_t splits, tiles_per_split;
};
inline BackwardPlan plan_backward(const ConvProblem& p, int vec, int bytes) {
  // Patches start at a multiple of the stride: up to stride - 1 pixels before the image.
  const int32_t height = p.h + p.pad_h % p.stride_h, width = p.w + p.pad_w % p.stride_w;
  const DepthwiseTile tile = choose_depthwise_tile(p.n, height, width, p.c / vec, 128 / (vec * bytes), p.stride_h,
                                                   kPatchW, p.r - 1, p.s - 1);
  const int64_t tiles = tile.pixel_tiles();
  // A slab is written and read once, 8 bytes a weight; x, dy and dx are worth ten times that to a split, or more.
  const int64_t least_pixels = ceil_div(10 * 8 * int64_t{p.r} * p.s, 3 * bytes);
  const int64_t most = ceil_div(p.nhw(), least_pixels) < tiles ? ceil_div(p.nhw(), least_pixels) : tiles;
  const int64_t wanted = ceil_div(kTargetBlocks, tile.tiles_c);
  const int64_t per_split = ceil_div(tiles, wanted < most ? wanted : most);
  return {tile, ceil_div(tiles, per_split), per_split};
}
template <class T>
BackwardPlan plan_of(const ConvProblem& p) {
  const int vec = p.r == 3 ? kRun<T, 3> : p.r == 5 ? kRun<T, 5> : kRun<T, 7>;
  return plan_backward(p, vec, sizeof(T));
}

template <class T>
const char* reject_backward(const ConvProblem& p) {
  if (const char* why = reject_unless_depthwise(p)) return why;
  if (p.k != p.c) return "its channel multiplier is not 1";
  if (p.x_layout != Layout::kNHWC || p.y_layout != Layout::kNHWC) return "it takes channels-last tensors alone";
  if (p.c % Vector<T>::kSize) return "the number of channels is not a multiple of 16 bytes";
  if (p.is_dilated()) return "the filter is dilated";
  if (p.r != p.s || (p.r != 3 && p.r != 5 && p.r != 7)) return "the filter is not 3x3, 5x5 or 7x7";
  if (p.stride_h != p.stride_w || p.stride_h > 2) return "the stride is not 1 or 2";
  return nullptr;
}

template <class T, int R, int STRIDE, bool DW>
const char* launch_backward_of(const ConvProblem& p, const void* dy, const void* x, const void* w, void* dx,
                               void* partial, void* stream) {
  constexpr int VEC = kRun<T, R>;
  const BackwardPlan plan = plan_of<T>(p);
  const int32_t pitch = plan.tile.lanes * VEC;
  const size_t shared = sizeof(float) * (R * R * pitch + (DW ? kDepthwiseThreads * VEC : 0));
  return launch_kernel(backward<T, VEC, R, STRIDE, DW>, dim3(static_cast<unsigned>(plan.splits * plan.tile.tiles_c)),
                       dim3(kDepthwiseThreads), shared, stream, p, plan.tile, plan.tiles_per_split,
                       static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<const T*>(w),
                       static_cast<T*>(dx), static_cast<float*>(partial));
}

template <class T, bool DW>
const char* launch_backward(const ConvProblem& p, const void* dy, const void* x, const void* w, void* dx,
                            void* partial, void* stream) {
  if (p.stride_h == 1) {
    if (p.r == 3) return launch_backward_of<T, 3, 1, DW>(p, dy, x, w, dx, partial, stream);
    if (p.r == 5) return launch_backward_of<T, 5, 1, DW>(p, dy, x, w, dx, partial, stream);
    return launch_backward_of<T, 7, 1, DW>(p, dy, x, w, dx, partial, stream);
  }
  if (p.r == 3) return launch_backward_of<T, 3, 2, DW>(p, dy, x, w, dx, partial, stream);
  if (p.r == 5) return launch_backward_of<T, 5, 2, DW>(p, dy, x, w, dx, partial, stream);
  return launch_backward_of<T, 7, 2, DW>(p, dy, x, w, dx, partial, stream);
}

template <class T>
const char* launch_dgrad(const ConvProblem& p, const LaunchArgs& args) {
  return launch_backward<T, false>(p, args.a, nullptr, args.b, args.out, nullptr, args.stream);
}

template <class T>
int64_t wgrad_workspace(const ConvProblem& p, int32_t) {
  return plan_of<T>(p).splits * p.w_size() * static_cast<int64_t>(sizeof(float));
}

template <class T>
const char* launch_wgrad(const ConvProblem& p, const LaunchArgs& args) {
  if (const char* error =
          launch_backward<T, true>(p, args.a, args.b, args.w, args.dx, args.workspace, args.stream)) {
    return error;
  }
  return launch_reduce_splits<T>(args.workspace, args.out, p.w_size(), static_cast<int32_t>(plan_of<T>(p).splits),
                                 args.stream);
}

// ---- any shape

// Where tap `tap` of input position `i` falls in the output: p*stride = i + pad - tap*dil. -1 where it does not.
CONVEXT_DEVICE int32_t output_of(int32_t i, int32_t tap, int32_t stride, int32_t pad, int32_t dil, int32_t size) {
  const int32_t shifted = i + pad - tap * dil;
  return shifted >= 0 && shifted % stride == 0 && shifted / stride < size ? shifted / stride : -1;
}

// One element of dx a thread; the grid's y walks over images, or over planes for NCHW.
template <class T>
__global__ void __launch_bounds__(kDepthwiseThreads, 1)
    dgrad_any(ConvProblem problem, Strides xs, Strides ys, FastDiv div_inner, FastDiv div_w,
              const T* __restrict__ dy, const T* __restrict__ w, T* __restrict__ dx) {
  const bool channels_last = problem.x_layout == Layout::kNHWC;
  const int32_t C = problem.c, multiplier = problem.k / problem.c, taps = problem.r * problem.s;
  const int32_t P = problem.p(), Q = problem.q();
  const int64_t inner = int64_t{problem.h} * problem.w * (channels_last ? C : 1);
  const int64_t outer = channels_last ? problem.n : int64_t{problem.n} * C;
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= inner) return;
  int32_t pixel, c = 0, h, column;
  div_inner(static_cast<uint32_t>(i), pixel, c);
  div_w(static_cast<uint32_t>(pixel), h, column);
  for (int64_t o = blockIdx.y; o < outer; o += gridDim.y) {
    const int64_t n = channels_last ? o : o / C;
    if (!channels_last) c = static_cast<int32_t>(o % C);
    accumulate_t<T> acc = 0;
    for (int32_t r = 0; r < problem.r; ++r) {
      const int32_t p = output_of(h, r, problem.stride_h, problem.pad_h, problem.dil_h, P);
      if (p < 0) continue;
      for (int32_t s = 0; s < problem.s; ++s) {
        const int32_t q = output_of(column, s, problem.stride_w, problem.pad_w, problem.dil_w, Q);
        if (q < 0) continue;
        for (int32_t m = 0; m < multiplier; ++m) {
          const int32_t k = c * multiplier + m;
          acc += to_accumulate(__ldg(dy + n * ys.n + k * ys.c + p * ys.h + q * ys.w)) *
                 to_accumulate(__ldg(w + int64_t{k} * taps + r * problem.s + s));
        }
      }
    }
    dx[n * xs.n + c * xs.c + h * xs.h + column * xs.w] = from_accumulate<T>(acc);
  }
}

// One tap of dw a block column: `lanes` filters by 256 / lanes output pixels at a time, one range of pixels a block.
template <class T>
__global__ void __launch_bounds__(kDepthwiseThreads, 1)
    wgrad_any(ConvProblem problem, Strides xs, Strides ys, FastDiv div_pq, FastDiv div_q, int32_t lanes,
              int32_t pixels_per_split, const T* __restrict__ dy, const T* __restrict__ x,
              accumulate_t<T>* __restrict__ partial) {
  using Acc = accumulate_t<T>;
  CONVEXT_SHARED_MEMORY(shared);
  Acc* scratch = reinterpret_cast<Acc*>(shared);  // (256)
  const int32_t multiplier = problem.k / problem.c, taps = problem.r * problem.s;
  const int32_t k = blockIdx.x * lanes + threadIdx.x % lanes;
  const int32_t r = blockIdx.y / problem.s, s = blockIdx.y % problem.s;
  const int64_t npq = problem.npq();
  const int64_t first = int64_t{blockIdx.z} * pixels_per_split;
  const int64_t last = first + pixels_per_split < npq ? first + pixels_per_split : npq;
  Acc acc = 0;
  if (k < problem.k) {
    const int32_t step = kDepthwiseThreads / lanes;
    for (int64_t m = first + threadIdx.x / lanes; m < last; m += step) {
      int32_t n, p, q, rest;
      div_pq(static_cast<uint32_t>(m), n, rest);
      div_q(static_cast<uint32_t>(rest), p, q);
      const int32_t h = problem.h_of(p, r), column = problem.w_of(q, s);
      if (h < 0 || h >= problem.h || column < 0 || column >= problem.w) continue;
      acc += to_accumulate(__ldg(dy + n * ys.n + k * ys.c + p * ys.h + q * ys.w)) *
             to_accumulate(__ldg(x + n * xs.n + (k / multiplier) * xs.c + h * xs.h + column * xs.w));
    }
  }
  scratch[threadIdx.x] = acc;
  __syncthreads();  // orders the threads' shares before their sum
  if (static_cast<int32_t>(threadIdx.x) < lanes && k < problem.k) {
    Acc sum = 0;
    for (int32_t i = threadIdx.x; i < kDepthwiseThreads; i += lanes) sum += scratch[i];
    partial[int64_t{blockIdx.z} * problem.k * taps + int64_t{k} * taps + blockIdx.y] = sum;
  }
}

const char* reject_any_dgrad(const ConvProblem& p) {
  if (const char* why = reject_unless_depthwise(p)) return why;
  const bool channels_last = p.x_layout == Layout::kNHWC;
  if (int64_t{p.h} * p.w * (channels_last ? p.c : 1) > INT32_MAX) return "one image has more than 2^31 elements";
  return nullptr;
}

template <class T>
const char* launch_dgrad_any(const ConvProblem& p, const LaunchArgs& args) {
  const bool channels_last = p.x_layout == Layout::kNHWC;
  const int64_t inner = int64_t{p.h} * p.w * (channels_last ? p.c : 1);
  const int64_t outer = channels_last ? p.n : int64_t{p.n} * p.c;
  const dim3 grid(static_cast<unsigned>(ceil_div(inner, kDepthwiseThreads)),
                  static_cast<unsigned>(outer < 65535 ? outer : 65535));
  return launch_kernel(dgrad_any<T>, grid, dim3(kDepthwiseThreads), 0, args.stream, p,
                       strides_of(p.x_layout, p.c, p.h, p.w), strides_of(p.y_layout, p.k, p.p(), p.q()),
                       FastDiv(channels_last ? p.c : 1), FastDiv(p.w), static_cast<const T*>(args.a),
                       static_cast<const T*>(args.b), static_cast<T*>(args.out));
}

struct AnyWgradPlan {
  int32_t lanes, blocks_k, splits, pixels_per_split;
};
inline AnyWgradPlan plan_wgrad_any(const ConvProblem& p) {
  AnyWgradPlan plan{};
  plan.lanes = p.y_layout == Layout::kNHWC ? 32 : 1;  // neighbours of a warp: filters, or pixels of a row
  plan.blocks_k = static_cast<int32_t>(ceil_div(p.k, plan.lanes));
  const int64_t smallest = 16 * kDepthwiseThreads / plan.lanes;  // pixels that are worth a block
  const int64_t wanted = ceil_div(4 * kTargetBlocks, int64_t{plan.blocks_k} * p.r * p.s);
  const int64_t most = ceil_div(p.npq(), smallest);
  plan.pixels_per_split = static_cast<int32_t>(ceil_div(p.npq(), wanted < most ? wanted : most));
  plan.splits = static_cast<int32_t>(ceil_div(p.npq(), plan.pixels_per_split));
  return plan;
}

const char* reject_any_wgrad(const ConvProblem& p) {
  if (const char* why = reject_unless_depthwise(p)) return why;
  if (p.npq() > INT32_MAX) return "there are more than 2^31 output pixels";
  if (int64_t{p.r} * p.s > 65535) return "the filter has more than 65535 taps";
  return nullptr;
}

template <class T>
int64_t wgrad_any_workspace(const ConvProblem& p, int32_t) {
  return plan_wgrad_any(p).splits * p.w_size() * static_cast<int64_t>(sizeof(accumulate_t<T>));
}

template <class T>
const char* launch_wgrad_any(const ConvProblem& p, const LaunchArgs& args) {
  const AnyWgradPlan plan = plan_wgrad_any(p);
  const dim3 grid(plan.blocks_k, p.r * p.s, plan.splits);
  if (const char* error = launch_kernel(
          wgrad_any<T>, grid, dim3(kDepthwiseThreads), kDepthwiseThreads * sizeof(accumulate_t<T>), args.stream, p,
          strides_of(p.x_layout, p.c, p.h, p.w), strides_of(p.y_layout, p.k, p.p(), p.q()),
          FastDiv(int64_t{p.p()} * p.q()), FastDiv(p.q()), plan.lanes, plan.pixels_per_split,
          static_cast<const T*>(args.a), static_cast<const T*>(args.b),
          static_cast<accumulate_t<T>*>(args.workspace))) {
    return error;
  }
  return launch_reduce_splits<T>(args.workspace, args.out, p.w_size(), plan.splits, args.stream);
}

template <class T>
constexpr Variant variant_of(const char* name, Pass pass, Layouts layouts, decltype(Variant::reject) reject,
                             decltype(Variant::workspace) workspace, decltype(Variant::launch) launch,
                             bool writes_dx = false) {
  return {.name = name, .algo = "depthwise", .device = Device::kCUDA, .pass = pass, .dtype = DTypeOf<T>::value,
          .isa = Isa::kSM80, .layouts = layouts, .reject = reject, .workspace = workspace, .launch = launch,
          .wgrad_writes_dx = writes_dx};
}

}  // namespace
}  // namespace convext::cuda

namespace convext {
#define CONVEXT_DEPTHWISE_WINDOW(T, dtype)                                                                    \
  extern const Variant dgrad_depthwise_##dtype##_window_sm80 =                                                \
      cuda::variant_of<T>("dgrad_depthwise_" #dtype "_window_sm80", Pass::kDgrad, Layouts::kNHWCOnly,         \
                          cuda::reject_backward<T>, nullptr, cuda::launch_dgrad<T>);                          \
  extern const Variant wgrad_depthwise_##dtype##_window_sm80 =                                                \
      cuda::variant_of<T>("wgrad_depthwise_" #dtype "_window_sm80", Pass::kWgrad, Layouts::kNHWCOnly,         \
                          cuda::reject_backward<T>, cuda::wgrad_workspace<T>, cuda::launch_wgrad<T>, true);
#define CONVEXT_DEPTHWISE_ANY(T, dtype)                                                                       \
  extern const Variant dgrad_depthwise_##dtype##_any_sm80 =                                                   \
      cuda::variant_of<T>("dgrad_depthwise_" #dtype "_any_sm80", Pass::kDgrad, Layouts::kAny,                 \
                          cuda::reject_any_dgrad, nullptr, cuda::launch_dgrad_any<T>);                        \
  extern const Variant wgrad_depthwise_##dtype##_any_sm80 =                                                   \
      cuda::variant_of<T>("wgrad_depthwise_" #dtype "_any_sm80", Pass::kWgrad, Layouts::kAny,                 \
                          cuda::reject_any_wgrad, cuda::wgrad_any_workspace<T>, cuda::launch_wgrad_any<T>);
CONVEXT_DEPTHWISE_WINDOW(cuda::bf16, bf16)
CONVEXT_DEPTHWISE_WINDOW(cuda::fp16, f16)
CONVEXT_DEPTHWISE_WINDOW(float, f32)
CONVEXT_DEPTHWISE_ANY(cuda::bf16, bf16)
CONVEXT_DEPTHWISE_ANY(cuda::fp16, f16)
CONVEXT_DEPTHWISE_ANY(float, f32)
CONVEXT_DEPTHWISE_ANY(double, f64)
}  // namespace convext
