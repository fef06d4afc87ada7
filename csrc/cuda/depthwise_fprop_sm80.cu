// Depthwise convolution, forward: y[n,p,q,k] = sum_{r,s} x[n,h,w,k/m] * w[k,r,s], m = K / C, then the epilogue.
//
// There is no matrix product in it: each channel is its own convolution, 2 R S FLOP for every element read and written
// once. At 3x3 in bf16 that is 18 FLOP for 4 bytes, far below what the FMA units would take: memory decides.
//
// window<T, R, STRIDE>: NHWC, m = 1. A thread owns 16 bytes of neighbouring channels (8 bf16) and PATCH_P x 4 outputs.
//   Input row by input row it loads the columns that its outputs see, once, into registers, and adds each row's share
//   to the accumulators of the output rows that the row belongs to:
//
//       input row h     | c0 c1 c2 c3 c4 c5 |      4 outputs, 3 taps, stride 1: 6 loads of 16 bytes
//       output rows       p (tap r = h - p), p + 1 (tap r - 1)
//
//   Registers: 2*4*8 accumulators + 6*4 columns + 3*8 weights = 112 at 3x3. Shared memory: the filters of the block's
//   channels, in fp32, R*S*64*4 B = 2.3 KiB at 3x3. The 16x16 tile of a block reads (18/16)^2 = 1.27 of its input: with
//   the output 1.13 of the least traffic, and the halo hits the second-level cache.
//   R = 0 stands for any filter, stride and dilation, at one output a thread.
// any<T>: either memory order, any multiplier and alignment, float64; one output a thread, neighbours along the
//   contiguous axis.
#include "tile/depthwise.h"
#include "tile/epilogue.h"

namespace convext::cuda {
namespace {

constexpr int kPatchQ = 4;

template <class T, int R, int STRIDE>
struct Window {
  static constexpr int VEC = Vector<T>::kSize;
  static constexpr int PATCH_P = R == 0 ? 1 : R <= 5 ? 2 : 1;
  static constexpr int PATCH_Q = R == 0 ? 1 : kPatchQ;
  static constexpr int COLS = (PATCH_Q - 1) * STRIDE + R;

  // Adds input row `columns` through filter row `weights` (R, channels of the block) to one row of outputs.
  static CONVEXT_DEVICE void add_row(const Run<T, VEC> (&columns)[COLS], const float* weights, int pitch,
                                     float (&acc)[PATCH_Q][VEC]) {
    float tap[R][VEC];
#pragma unroll
    for (int s = 0; s < R; ++s) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) tap[s][v] = weights[s * pitch + v];
    }
#pragma unroll
    for (int col = 0; col < COLS; ++col) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) {
        const float value = to_accumulate(columns[col].v[v]);
#pragma unroll
        for (int q = 0; q < PATCH_Q; ++q) {
          const int s = col - q * STRIDE;
          if (s >= 0 && s < R) acc[q][v] += value * tap[s][v];
        }
      }
    }
  }
};

template <class T, int R, int STRIDE>
__global__ void __launch_bounds__(kDepthwiseThreads, 1)
    window(ConvProblem problem, DepthwiseTile tile, const T* __restrict__ x, const T* __restrict__ w,
           T* __restrict__ y, Epilogue epilogue) {
  using W = Window<T, R, STRIDE>;
  constexpr int VEC = W::VEC;
  CONVEXT_SHARED_MEMORY(shared);
  float* filters = reinterpret_cast<float*>(shared);  // (R*S, lanes*VEC)
  const int32_t P = problem.p(), Q = problem.q(), C = problem.c;
  const int32_t pitch = tile.lanes * VEC;

  // Which tile: channel tiles are the fastest index, so that neighbouring blocks read neighbouring bytes.
  int64_t block_index = blockIdx.x;
  const int32_t c_block = static_cast<int32_t>(block_index % tile.tiles_c) * pitch;
  block_index /= tile.tiles_c;
  const int32_t tile_w = static_cast<int32_t>(block_index % tile.tiles_w);
  block_index /= tile.tiles_w;
  const int32_t tile_h = static_cast<int32_t>(block_index % tile.tiles_h);
  const int32_t tile_n = static_cast<int32_t>(block_index / tile.tiles_h);

  const int32_t taps = problem.r * problem.s;
  for (int32_t i = threadIdx.x; i < taps * pitch; i += kDepthwiseThreads) {
    const int32_t channel = i / taps, tap = i % taps;
    const int32_t c = c_block + channel;
    filters[tap * pitch + channel] = c < C ? to_accumulate(__ldg(w + int64_t{c} * taps + tap)) : 0.0f;
  }
  __syncthreads();  // orders the filters before every thread's reads below

  int32_t t = threadIdx.x;
  const int32_t lane = t % tile.lanes;
  t /= tile.lanes;
  const int32_t q0 = (tile_w * tile.across_w + t % tile.across_w) * W::PATCH_Q;
  t /= tile.across_w;
  const int32_t p0 = (tile_h * tile.across_h + t % tile.across_h) * W::PATCH_P;
  const int32_t n = tile_n * tile.across_n + t / tile.across_h;
  const int32_t c = c_block + lane * VEC;
  if (c >= C || q0 >= Q || p0 >= P || n >= problem.n) return;

  const T* image = x + int64_t{n} * problem.h * problem.w * C + c;
  const float* my_filters = filters + lane * VEC;
  const int32_t h0 = problem.h_of(p0, 0), w0 = problem.w_of(q0, 0);
  float acc[W::PATCH_P][W::PATCH_Q][VEC] = {};

  if constexpr (R > 0) {
#pragma unroll
    for (int row = 0; row < (W::PATCH_P - 1) * STRIDE + R; ++row) {
      const int32_t h = h0 + row;
      if (h < 0 || h >= problem.h) continue;
      const T* line = image + int64_t{h} * problem.w * C;
      Run<T, VEC> columns[W::COLS];
#pragma unroll
      for (int col = 0; col < W::COLS; ++col) {
        const int32_t column = w0 + col;
        columns[col] = column >= 0 && column < problem.w ? load_run<T, VEC>(line + int64_t{column} * C)
                                                         : zero_run<T, VEC>();
      }
#pragma unroll
      for (int p = 0; p < W::PATCH_P; ++p) {
        const int r = row - p * STRIDE;
        if (r >= 0 && r < R) W::add_row(columns, my_filters + r * R * pitch, pitch, acc[p]);
      }
    }
  } else {
    for (int32_t r = 0; r < problem.r; ++r) {
      const int32_t h = h0 + r * problem.dil_h;
      if (h < 0 || h >= problem.h) continue;
      for (int32_t s = 0; s < problem.s; ++s) {
        const int32_t column = w0 + s * problem.dil_w;
        if (column < 0 || column >= problem.w) continue;
        const Run<T, VEC> value = load_run<T, VEC>(image + (int64_t{h} * problem.w + column) * C);
        const float* tap = my_filters + (r * problem.s + s) * pitch;
#pragma unroll
        for (int v = 0; v < VEC; ++v) acc[0][0][v] += to_accumulate(value.v[v]) * tap[v];
      }
    }
  }

#pragma unroll
  for (int p = 0; p < W::PATCH_P; ++p) {
#pragma unroll
    for (int q = 0; q < W::PATCH_Q; ++q) {
      if (p0 + p >= P || q0 + q >= Q) continue;
      const int64_t offset = ((int64_t{n} * P + p0 + p) * Q + q0 + q) * C + c;
      apply_epilogue<T, true>(epilogue, acc[p][q], c, offset);
      store_run<T, VEC>(y + offset, acc[p][q]);
    }
  }
}

// Channels of a block such that its filters fit into the shared memory that needs no asking for.
template <class T>
int32_t window_lanes(const ConvProblem& p) {
  constexpr int64_t kBudget = 48 * 1024;
  int32_t lanes = 8;
  while (lanes > 1 && int64_t{p.r} * p.s * lanes * Vector<T>::kSize * 4 > kBudget) lanes /= 2;
  return lanes;
}

template <class T>
const char* reject_window(const ConvProblem& p) {
  if (const char* why = reject_unless_depthwise(p)) return why;
  if (p.k != p.c) return "its channel multiplier is not 1";
  if (p.x_layout != Layout::kNHWC || p.y_layout != Layout::kNHWC) return "it takes channels-last tensors alone";
  if (p.c % Vector<T>::kSize) return "the number of channels is not a multiple of 16 bytes";
  if (int64_t{p.r} * p.s * Vector<T>::kSize * 4 > 48 * 1024) return "the filter is too large for shared memory";
  return nullptr;
}

template <class T, int R, int STRIDE>
const char* launch_window_of(const ConvProblem& p, const LaunchArgs& args) {
  using W = Window<T, R, STRIDE>;
  const DepthwiseTile tile =
      choose_depthwise_tile(p.n, p.p(), p.q(), p.c / W::VEC, window_lanes<T>(p), W::PATCH_P, W::PATCH_Q,
                            p.dil_h * (p.r - 1), p.dil_w * (p.s - 1));
  const int64_t blocks = tile.pixel_tiles() * tile.tiles_c;
  if (blocks > INT32_MAX) return "the grid would exceed 2^31 blocks";
  const size_t shared = sizeof(float) * p.r * p.s * tile.lanes * W::VEC;
  return launch_kernel(window<T, R, STRIDE>, dim3(static_cast<unsigned>(blocks)), dim3(kDepthwiseThreads), shared,
                       args.stream, p, tile, static_cast<const T*>(args.a), static_cast<const T*>(args.b),
                       static_cast<T*>(args.out), args.epilogue);
}

template <class T>
const char* launch_window(const ConvProblem& p, const LaunchArgs& args) {
  const bool square = p.r == p.s && p.stride_h == p.stride_w && !p.is_dilated();
  if (square && p.stride_h == 1) {
    if (p.r == 3) return launch_window_of<T, 3, 1>(p, args);
    if (p.r == 5) return launch_window_of<T, 5, 1>(p, args);
    if (p.r == 7) return launch_window_of<T, 7, 1>(p, args);
  }
  if (square && p.stride_h == 2) {
    if (p.r == 3) return launch_window_of<T, 3, 2>(p, args);
    if (p.r == 5) return launch_window_of<T, 5, 2>(p, args);
    if (p.r == 7) return launch_window_of<T, 7, 2>(p, args);
  }
  return launch_window_of<T, 0, 1>(p, args);
}

// One output a thread. The grid's y walks over what lies outermost: images, or planes for NCHW.
template <class T>
__global__ void __launch_bounds__(kDepthwiseThreads, 1)
    any(ConvProblem problem, Strides xs, Strides ys, FastDiv div_inner, FastDiv div_q, const T* __restrict__ x,
        const T* __restrict__ w, T* __restrict__ y, Epilogue epilogue) {
  using Acc = accumulate_t<T>;
  const bool channels_last = problem.y_layout == Layout::kNHWC;
  const int32_t K = problem.k, multiplier = problem.k / problem.c;
  const int64_t inner = int64_t{problem.p()} * problem.q() * (channels_last ? K : 1);
  const int64_t outer = channels_last ? problem.n : int64_t{problem.n} * K;
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= inner) return;
  int32_t pixel, k = 0, p, q;
  div_inner(static_cast<uint32_t>(i), pixel, k);
  div_q(static_cast<uint32_t>(pixel), p, q);
  for (int64_t o = blockIdx.y; o < outer; o += gridDim.y) {
    const int64_t n = channels_last ? o : o / K;
    if (!channels_last) k = static_cast<int32_t>(o % K);
    const T* plane = x + n * xs.n + int64_t{k / multiplier} * xs.c;
    const T* filter = w + int64_t{k} * problem.r * problem.s;
    Acc acc[1] = {0};
    for (int32_t r = 0; r < problem.r; ++r) {
      const int32_t h = problem.h_of(p, r);
      if (h < 0 || h >= problem.h) continue;
      for (int32_t s = 0; s < problem.s; ++s) {
        const int32_t column = problem.w_of(q, s);
        if (column < 0 || column >= problem.w) continue;
        acc[0] += to_accumulate(__ldg(plane + h * xs.h + column * xs.w)) *
                  to_accumulate(__ldg(filter + r * problem.s + s));
      }
    }
    const int64_t offset = n * ys.n + k * ys.c + p * ys.h + q * ys.w;
    apply_epilogue<T, false>(epilogue, acc, k, offset);
    y[offset] = from_accumulate<T>(acc[0]);
  }
}

const char* reject_any(const ConvProblem& p) {
  if (const char* why = reject_unless_depthwise(p)) return why;
  const bool channels_last = p.y_layout == Layout::kNHWC;
  if (int64_t{p.p()} * p.q() * (channels_last ? p.k : 1) > INT32_MAX) return "one image has more than 2^31 outputs";
  return nullptr;
}

template <class T>
const char* launch_any(const ConvProblem& p, const LaunchArgs& args) {
  const bool channels_last = p.y_layout == Layout::kNHWC;
  const int64_t inner = int64_t{p.p()} * p.q() * (channels_last ? p.k : 1);
  const int64_t outer = channels_last ? p.n : int64_t{p.n} * p.k;
  const dim3 grid(static_cast<unsigned>(ceil_div(inner, kDepthwiseThreads)),
                  static_cast<unsigned>(outer < 65535 ? outer : 65535));
  return launch_kernel(any<T>, grid, dim3(kDepthwiseThreads), 0, args.stream, p,
                       strides_of(p.x_layout, p.c, p.h, p.w), strides_of(p.y_layout, p.k, p.p(), p.q()),
                       FastDiv(channels_last ? p.k : 1), FastDiv(p.q()), static_cast<const T*>(args.a),
                       static_cast<const T*>(args.b), static_cast<T*>(args.out), args.epilogue);
}

template <class T>
constexpr Variant window_variant(const char* name) {
  return {.name = name, .algo = "depthwise", .device = Device::kCUDA, .pass = Pass::kFprop, .dtype = DTypeOf<T>::value,
          .isa = Isa::kSM80, .layouts = Layouts::kNHWCOnly, .reject = reject_window<T>, .launch = launch_window<T>};
}
template <class T>
constexpr Variant any_variant(const char* name) {
  return {.name = name, .algo = "depthwise", .device = Device::kCUDA, .pass = Pass::kFprop, .dtype = DTypeOf<T>::value,
          .isa = Isa::kSM80, .layouts = Layouts::kAny, .reject = reject_any, .launch = launch_any<T>};
}

}  // namespace
}  // namespace convext::cuda

namespace convext {
#define CONVEXT_DEPTHWISE_FPROP(T, dtype)                                                              \
  extern const Variant fprop_depthwise_##dtype##_window_sm80 =                                         \
      cuda::window_variant<T>("fprop_depthwise_" #dtype "_window_sm80");                               \
  extern const Variant fprop_depthwise_##dtype##_any_sm80 =                                            \
      cuda::any_variant<T>("fprop_depthwise_" #dtype "_any_sm80");
CONVEXT_DEPTHWISE_FPROP(cuda::bf16, bf16)
CONVEXT_DEPTHWISE_FPROP(cuda::fp16, f16)
CONVEXT_DEPTHWISE_FPROP(float, f32)
extern const Variant fprop_depthwise_f64_any_sm80 = cuda::any_variant<double>("fprop_depthwise_f64_any_sm80");
}  // namespace convext
