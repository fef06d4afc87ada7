// Depthwise convolution, forward: y[n,p,q,k] = sum_{r,s} x[n,h,w,k/m] * w[k,r,s], m = K / C, then the epilogue.
//
// There is no matrix product in it: each channel is its own convolution, 2 R S FLOP for every element read and written
// once. At 3x3 in bf16 that is 18 FLOP for 4 bytes, far below what the FMA units would take: memory decides.
//
// One kernel, depthwise<T, VEC, R, STRIDE, FORM, STATS>. A thread owns VEC neighbouring channels and a patch of outputs.
// Input row by input row it loads the columns that its outputs see, once, into registers, and adds each row's share to
// the accumulators of the output rows that the row belongs to. A block walks over a range of tiles:
//
//       input row h     | c0 c1 c2 c3 c4 c5 |      4 outputs, 3 taps, stride 1: 6 loads
//       output rows       p (tap r = h - p), p + 1 (tap r - 1)
//
// The loop over rows stays a loop: unrolled, the compiler loads rows ahead and keeps all weights, and 128 registers, for
// two blocks of 8 warps, do not do. 16 warps with 6 loads of 16 bytes each on their way are 48 KiB; an estimate of what
// hides the latency of memory is 12.
//
// window  NHWC, m = 1: a thread has 16 bytes of channels (8 bf16) and 1 x 4 outputs. Of registers, 4*8 accumulators +
//   6*4 columns + 3*4 weights, of half its channels at a time, = 68 at 3x3 hold values; the widest, 7x7, has 100, and at
//   stride 2 two outputs. What rows share is found in the first-level cache: 18 loads for 4 outputs at 3x3. An output
//   of 8 channels, 32 bytes of traffic, takes 72 FMA and 36 instructions that widen bf16. R = 0 stands for any filter,
//   stride and dilation, at one output a thread.
// planes  NCHW: VEC = 1, neighbouring threads along a row, 2 x 4 outputs each; small planes lie side by side in a tile.
//   A load is 2 bytes a thread and 64 or more a warp; rows and taps overlap in the first-level cache: at 3x3 24 loads
//   and 72 FMA for 8 outputs.
// any     VEC = 1, R = 0, any memory order, multiplier, alignment, and float64.
// Shared memory: the filters of the block's channels, R*S*72*4 B = 2.5 KiB at 3x3 (window); with statistics, after
// that, 32*(2*68 + 1)*4 B = 17 KiB. Statistics are one row of partials a block.
//
// @sass depthwise<.*, [48], .*, 0, false>     shared=14112 warps=16 stores=16
// @sass depthwise<.*, 8, 5, 2, 0, true>       shared=24592 warps=8
// @sass depthwise<.*, 8, 7, 1, 0, true>       shared=31648 warps=8
// @sass depthwise<.*, [48], .*, 0, true>      shared=31648 warps=16
// @sass depthwise<.*, 1, .*, [12], false>     shared=3528  warps=16
// @sass depthwise<.*, 1, .*, [12], true>      shared=21064 warps=16
#include "cuda/tile/epilogue.h"
#include "cuda/tile/statistics.h"
#include "depthwise.h"

namespace convext::cuda {
namespace {

template <class T_, int VEC_, int R_, int STRIDE_, Form FORM_>
struct Window {
  using T = T_;
  using Acc = accumulate_t<T>;
  static constexpr int VEC = VEC_, R = R_, STRIDE = STRIDE_;
  static constexpr Form FORM = FORM_;
  static constexpr int PATCH_P = FORM == Form::kNCHW && R <= 5 ? 2 : 1;
  static constexpr int PATCH_Q = R == 0 ? 1 : R == 7 && STRIDE == 2 && VEC > 4 ? 2 : 4;
  static constexpr int PART = VEC < 4 ? VEC : 4;
  static constexpr int COLS = (PATCH_Q - 1) * STRIDE + R;
  static constexpr bool SHARED_FILTERS = FORM != Form::kAny;
  // A run of outputs side by side in memory: channels of a pixel, or for NCHW pixels of a row.
  static constexpr int RUN = FORM == Form::kNCHW ? PATCH_Q : VEC;

  // Adds input row `columns` through filter row `weights` (R, channels of the block) to one row of outputs, PART channels
  // at a time, so that few weights and widened inputs are in registers at once.
  static CONVEXT_DEVICE void add_row(const Run<T, VEC> (&columns)[COLS], const Acc* weights, int pitch,
                                     Acc (&acc)[PATCH_Q][VEC]) {
#pragma unroll
    for (int part = 0; part < VEC; part += PART) {
      Acc tap[R][PART];
#pragma unroll
      for (int s = 0; s < R; ++s) load_weights(weights + s * pitch + part, tap[s]);
#pragma unroll
      for (int col = 0; col < COLS; ++col) {
#pragma unroll
        for (int v = 0; v < PART; ++v) {
          const Acc value = to_accumulate(columns[col].v[part + v]);
#pragma unroll
          for (int q = 0; q < PATCH_Q; ++q) {
            const int s = col - q * STRIDE;
            if (s >= 0 && s < R) acc[q][part + v] += value * tap[s][v];
          }
        }
      }
    }
  }

  // With NCHW the distance of columns is known: 1.
  static CONVEXT_DEVICE int64_t column_step(const Strides& of) { return FORM == Form::kNCHW ? 1 : of.w; }

  // Adds all that one output sees of the image, for any filter: in shared memory, or (one channel) at `filter`.
  static CONVEXT_DEVICE void add_output(const ConvProblem& problem, const Strides& xs, const T* image, int32_t p,
                                        int32_t q, const T* filter, const Acc* filters, int pitch, Acc (&acc)[VEC]) {
    const int32_t h0 = problem.h_of(p, 0), w0 = problem.w_of(q, 0);
    for (int32_t r = 0; r < problem.r; ++r) {
      const int32_t h = h0 + r * problem.dil_h;
      if (h < 0 || h >= problem.h) continue;
      for (int32_t s = 0; s < problem.s; ++s) {
        const int32_t column = w0 + s * problem.dil_w, tap = r * problem.s + s;
        if (column < 0 || column >= problem.w) continue;
        const Run<T, VEC> value = load_run<T, VEC>(image + h * xs.h + column * column_step(xs));
        Acc weight[VEC];
        if constexpr (SHARED_FILTERS) load_weights(filters + tap * pitch, weight);
        else weight[0] = to_accumulate(__ldg(filter + tap));
#pragma unroll
        for (int v = 0; v < VEC; ++v) acc[v] += to_accumulate(value.v[v]) * weight[v];
      }
    }
  }

  // The epilogue of the `rows` x `columns` outputs that exist, from y[offset] on, and what `seen` is to know of them.
  static CONVEXT_DEVICE void store_patch(const Strides& ys, int64_t offset, int32_t rows, int32_t columns, int32_t k,
                                         const Epilogue& epilogue, bool vector_out, Acc (&acc)[PATCH_P][PATCH_Q][VEC],
                                         T* y, Welford<Acc, VEC>* seen) {
#pragma unroll
    for (int p = 0; p < PATCH_P; ++p) {
      if (p >= rows) break;
      const int64_t line = offset + p * ys.h;
      if constexpr (FORM == Form::kNCHW) {
        const Span span{k, 0, line, 1, columns, vector_out};
        Acc run[RUN];
#pragma unroll
        for (int q = 0; q < PATCH_Q; ++q) run[q] = acc[p][q][0];
        apply_epilogue<T>(epilogue, run, span);
        store_span(y, run, span);
#pragma unroll
        for (int q = 0; q < PATCH_Q; ++q) acc[p][q][0] = run[q];
      } else {
#pragma unroll
        for (int q = 0; q < PATCH_Q; ++q) {
          if (q >= columns) break;
          const Span span{k, 1, line + q * ys.w, 1, VEC, VEC > 1};
          apply_epilogue<T>(epilogue, acc[p][q], span);
          store_span(y, acc[p][q], span);
        }
      }
      if (!seen) continue;
#pragma unroll
      for (int q = 0; q < PATCH_Q; ++q) {
        if (q < columns) seen->template add_stored<T>(acc[p][q]);
      }
    }
  }
};

// Blocks a multiprocessor. The widest rows with statistics would not fit 128 registers by a few.
template <int VEC, int R, int STRIDE, bool STATS>
constexpr int blocks_of = STATS && VEC == 8 && R + 2 * STRIDE == 9 ? 1 : 2;

// STATS: it writes partial statistics of what it stores, for which each thread keeps 2*VEC + 1 values.
template <class T, int VEC, int R, int STRIDE, Form FORM, bool STATS>
__global__ void __launch_bounds__(kDepthwiseThreads, (blocks_of<VEC, R, STRIDE, STATS>))
    depthwise(ConvProblem problem, DepthwiseTile tile, int64_t tiles_per_split, Strides xs, Strides ys,
              const T* __restrict__ x, const T* __restrict__ w, T* __restrict__ y, Epilogue epilogue, bool vector_out,
              PartialStats<accumulate_t<T>> stats) {
  using W = Window<T, VEC, R, STRIDE, FORM>;
  using Acc = accumulate_t<T>;
  CONVEXT_SHARED_MEMORY(shared);
  Acc* filters = reinterpret_cast<Acc*>(shared);  // (R*S, pitch)
  const int32_t P = problem.p(), Q = problem.q(), K = problem.k;
  const int32_t columns = tile.lanes * VEC, pitch = weight_place(columns), taps = problem.r * problem.s;

  // Channel tiles are the fastest index, so that neighbouring blocks read neighbouring bytes.
  const int64_t split = blockIdx.x / tile.tiles_c;
  const int32_t k_block = static_cast<int32_t>(blockIdx.x % tile.tiles_c) * columns;
  if constexpr (W::SHARED_FILTERS) load_filters(filters, w, taps, columns, k_block, K);

  const DepthwisePlace place(tile, lanes_innermost<FORM>(problem.y_layout));
  const int32_t k = k_block + place.lane * VEC;
  Welford<Acc, VEC> seen;
#pragma unroll 1
  for (DepthwiseWalk walk(tile, split, tiles_per_split); walk.left > 0; walk.next(tile)) {
    const DepthwisePatch at(tile, place, walk);
    const int32_t q0 = at.column * W::PATCH_Q, p0 = at.row * W::PATCH_P, n = at.n;
    if (k >= K || q0 >= Q || p0 >= P || n >= problem.n) continue;
    const T* image = x + n * xs.n + (VEC == 1 ? k / (K / problem.c) : k) * xs.c;
    Acc acc[W::PATCH_P][W::PATCH_Q][VEC] = {};
    if constexpr (R > 0) {
      const Acc* my_filters = filters + weight_place(place.lane * VEC);
      const int32_t row_step = static_cast<int32_t>(xs.h), column_step = static_cast<int32_t>(W::column_step(xs));
      const int32_t h0 = problem.h_of(p0, 0), w0 = problem.w_of(q0, 0);
      uint32_t inside = 0;  // a bit a column
#pragma unroll
      for (int col = 0; col < W::COLS; ++col) {
        if (w0 + col >= 0 && w0 + col < problem.w) inside |= 1u << col;
      }
#pragma unroll 1  // what it would load ahead of other rows has no room in registers
      for (int row = 0; row < (W::PATCH_P - 1) * STRIDE + R; ++row) {
        const int32_t h = h0 + row;
        if (h < 0 || h >= problem.h) continue;
        int32_t offset = h * row_step + w0 * column_step;
        Run<T, VEC> columns[W::COLS];
#pragma unroll
        for (int col = 0; col < W::COLS; ++col, offset += column_step) {
          columns[col] = inside >> col & 1 ? load_run<T, VEC>(image + offset) : zero_run<T, VEC>();
        }
#pragma unroll
        for (int p = 0; p < W::PATCH_P; ++p) {
          const int r = row - p * STRIDE;
          if (r >= 0 && r < R) W::add_row(columns, my_filters + r * R * pitch, pitch, acc[p]);
        }
      }
    } else {
      W::add_output(problem, xs, image, p0, q0, w + int64_t{k} * taps, filters + weight_place(place.lane * VEC), pitch,
                    acc[0][0]);
    }
    const int64_t corner = n * ys.n + p0 * ys.h + q0 * W::column_step(ys) + k * ys.c;
    W::store_patch(ys, corner, P - p0, Q - q0, k, epilogue, vector_out, acc, y, STATS ? &seen : nullptr);
  }

  if constexpr (STATS) {
    Acc* scratch = filters + (W::SHARED_FILTERS ? taps * pitch : 0);
    merge_block(seen, scratch, place.pixel, kDepthwiseThreads / tile.lanes, place.lane * VEC, columns,
                [&](int column, Acc count, Acc mean, Acc m2) {
      if (k_block + column < K) stats.store(split, k_block + column, count, mean, m2);
    });
  }
}

constexpr int64_t kFilterBudget = 24 * 1024;  // bytes of shared memory
constexpr int64_t kTargetBlocks = 8 * kProcessors, kFewBlocks = 3 * kProcessors / 2;

template <class W>
DepthwisePlan plan_of(const ConvProblem& p) {
  constexpr int64_t kBytes = sizeof(typename W::T);
  const int32_t halo_h = p.dil_h * (p.r - 1), halo_w = p.dil_w * (p.s - 1);
  const bool channels_last = W::FORM == Form::kNHWC || (W::FORM == Form::kAny && p.y_layout == Layout::kNHWC);
  int32_t lanes = channels_last ? channel_lanes(p, W::VEC * kBytes) : plane_lanes(p.k, int64_t{p.p()} * p.q() * kBytes);
  while (W::SHARED_FILTERS && lanes > 1 && int64_t{p.r} * p.s * weight_place(lanes * W::VEC) * 4 > kFilterBudget)
    lanes /= 2;
  const int32_t sector = channels_last ? 0 : 32 / kBytes;  // a tile's rows of a plane start and end within one
  const DepthwiseTile tile = choose_depthwise_tile(p.n, p.p(), p.q(), static_cast<int32_t>(ceil_div(p.k, W::VEC)),
                                                   lanes, W::PATCH_P, W::PATCH_Q, halo_h, halo_w + sector);
  // Two tiles a block at least, which finds half of a border in the cache, unless that leaves multiprocessors idle.
  const int64_t in_twos = std::max(tile.pixel_tiles() * tile.tiles_c / 2, kFewBlocks);
  return split_tiles(tile, std::min(kTargetBlocks, in_twos), INT64_MAX, p.is_dilated());
}

template <class W>
const char* launch_as(const ConvProblem& p, const LaunchArgs& args) {
  using T = typename W::T;
  using Acc = typename W::Acc;
  const DepthwisePlan plan = plan_of<W>(p);
  const DepthwiseTile& tile = plan.tile;
  if (plan.blocks() > INT32_MAX) return "the grid would exceed 2^31 blocks";
  const int32_t columns = tile.lanes * W::VEC;
  const int64_t filters = W::SHARED_FILTERS ? int64_t{p.r} * p.s * weight_place(columns) : 0;
  const int64_t merging = args.stats ? merge_scratch(kDepthwiseThreads / tile.lanes, columns) : 0;
  const bool vector_out = W::FORM == Form::kNCHW && p.q() % W::RUN == 0;
  const auto run = [&](auto kernel) {
    return launch_kernel(kernel, dim3(static_cast<unsigned>(plan.blocks())), dim3(kDepthwiseThreads),
                         sizeof(Acc) * (filters + merging), args.stream, p, tile, plan.tiles_per_split,
                         strides_of(p.x_layout, p.c, p.h, p.w), strides_of(p.y_layout, p.k, p.p(), p.q()),
                         static_cast<const T*>(args.a), static_cast<const T*>(args.b), static_cast<T*>(args.out),
                         args.epilogue, vector_out, PartialStats<Acc>(args.stats, plan.splits, p.k));
  };
  return args.stats ? run(depthwise<T, W::VEC, W::R, W::STRIDE, W::FORM, true>)
                    : run(depthwise<T, W::VEC, W::R, W::STRIDE, W::FORM, false>);
}

// Offsets inside of an image have 32 bits then.
bool is_square(const ConvProblem& p) {
  return int64_t{p.h} * p.w * p.c < (1 << 30) && p.r == p.s && (p.r == 3 || p.r == 5 || p.r == 7) &&
         p.stride_h == p.stride_w && p.stride_h <= 2 && !p.is_dilated();
}

// Calls f(Window<...>{}) with the instance that serves the problem.
template <class T, int VEC, Form FORM, class F>
auto with_window(const ConvProblem& p, F&& f) {
  if constexpr (FORM != Form::kAny) {
    if (is_square(p)) {
      return with_square_filter(p,
                                [&](auto r, auto stride) { return f(Window<T, VEC, r.value, stride.value, FORM>{}); });
    }
  }
  if constexpr (FORM != Form::kNCHW) return f(Window<T, VEC, 0, 1, FORM>{});
  __builtin_unreachable();  // rejected
}

template <class T, int VEC, Form FORM>
const char* launch(const ConvProblem& p, const LaunchArgs& args) {
  return with_window<T, VEC, FORM>(p, [&](auto window) { return launch_as<decltype(window)>(p, args); });
}
template <class T, int VEC, Form FORM>
int64_t stats_rows(const ConvProblem& p) {
  return with_window<T, VEC, FORM>(p, [&](auto window) { return plan_of<decltype(window)>(p).splits; });
}

template <class T, int VEC, Form FORM>
const char* reject(const ConvProblem& p) {
  if (const char* why = reject_unless_depthwise(p)) return why;
  if (FORM == Form::kNHWC) {
    if (p.k != p.c) return "its channel multiplier is not 1";
    if (p.x_layout != Layout::kNHWC || p.y_layout != Layout::kNHWC) return "it takes channels-last tensors alone";
    if (p.c % VEC) return "the number of channels is not a multiple of 16 bytes";
    if (int64_t{p.r} * p.s * VEC * 4 > kFilterBudget) return "the filter is too large for shared memory";
  }
  if (FORM == Form::kNCHW) {
    if (p.x_layout != Layout::kNCHW || p.y_layout != Layout::kNCHW) return "it takes contiguous tensors alone";
    if (!is_square(p)) {
      return "the filter is not 3x3, 5x5 or 7x7 at stride 1 or 2 without dilation, or an image too large";
    }
  }
  return nullptr;
}

template <class T, int VEC, Form FORM>
constexpr Variant variant_of(const char* name) {
  Variant v = cuda_variant<T>(name, Algorithm::depthwise, Pass::kFprop,
                              FORM == Form::kNHWC ? Layouts::kNHWCOnly : Layouts::kAny);
  v.reject = reject<T, VEC, FORM>;
  v.cost = FORM == Form::kAny ? any_depthwise_cost : depthwise_cost;
  v.launch = launch<T, VEC, FORM>;
  v.stats_rows = stats_rows<T, VEC, FORM>;
  return v;
}

}  // namespace
}  // namespace convext::cuda

namespace convext {
#define CONVEXT_DEPTHWISE(T, dtype, form, VEC, FORM)             \
  extern const Variant fprop_depthwise_##dtype##_##form##_sm80 = \
      cuda::variant_of<T, VEC, cuda::Form::FORM>("fprop_depthwise_" #dtype "_" #form "_sm80");
#define CONVEXT_DEPTHWISE_FORMS(T, dtype)                            \
  CONVEXT_DEPTHWISE(T, dtype, window, cuda::Vector<T>::kSize, kNHWC) \
  CONVEXT_DEPTHWISE(T, dtype, planes, 1, kNCHW)                      \
  CONVEXT_DEPTHWISE(T, dtype, any, 1, kAny)
CONVEXT_DEPTHWISE_FORMS(cuda::bf16, bf16)
CONVEXT_DEPTHWISE_FORMS(cuda::fp16, f16)
CONVEXT_DEPTHWISE_FORMS(float, f32)
CONVEXT_DEPTHWISE(double, f64, any, 1, kAny)
}  // namespace convext
