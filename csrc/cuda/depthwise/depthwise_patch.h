// Depthwise backward with a patch of pixels in registers: multiplier 1, no dilation, 3x3, 5x5, 7x7, stride 1 or 2. The
// kernel of depthwise_backward_window_sm80.cu (NHWC) and depthwise_backward_planes_sm80.cu (NCHW).
//
// backward<T, VEC, R, STRIDE, FORM, DW>: a thread owns VEC channels and, at a time, a patch of STRIDE x 4 input pixels
// that starts at a multiple of the stride, so that which taps meet which pixels is known to the compiler:
//
//     x    | 0 1 2 3 |          stride 2, R = 3: pixel 0 meets taps 0 and 2, pixel 1 meets tap 1, ...
//     dy   | -1  0  1 |         columns of dy: (pixel - tap) / stride
//
// dw stays in registers, R*R*VEC accumulators. At the end each warp adds up by shuffles, the warps through shared
// memory, and the block writes one fp32 slab.
#pragma once
#include "depthwise_backward.h"

namespace convext::cuda {

template <int R, int STRIDE>
struct Patch {
  static_assert(kPatchW % STRIDE == 0, "a patch starts at a multiple of the stride");
  static constexpr int H = STRIDE, W = kPatchW;
  static constexpr int LOW = (R - 1) / STRIDE;  // columns of dy left of the patch's first
  static constexpr int COLS = LOW + (W - 1) / STRIDE + 1;
};

// One row of a patch: what dy adds to its pixels of dx, and they to dw. `w0`: the patch's first column; `q0`: the column
// of dy that meets it through tap 0.
template <class T, int VEC, int R, int STRIDE, Form FORM, bool DW>
struct PatchRow {
  using Pt = Patch<R, STRIDE>;
  static constexpr int TAPS = DW ? R : 1;  // of dw, along an axis

  const ConvProblem& problem;
  int32_t Q, q0, w0;
  int64_t x_step, y_step;  // between columns

  CONVEXT_DEVICE void load_pixels(const T* x_line, Run<T, VEC> (&pixels)[Pt::W]) const {
#pragma unroll
    for (int j = 0; j < Pt::W; ++j) {
      const int32_t column = w0 + j;
      pixels[j] = column >= 0 && column < problem.w ? load_run<T, VEC>(x_line + column * x_step) : zero_run<T, VEC>();
    }
  }

  // Filter row r through row `y_line` of dy.
  CONVEXT_DEVICE void add(int r, const T* y_line, const float* filters, int32_t pitch,
                          const Run<T, VEC> (&pixels)[Pt::W], float (&acc)[Pt::W][VEC],
                          float (&dw)[TAPS][TAPS][VEC]) const {
    Run<T, VEC> window[Pt::COLS];
#pragma unroll
    for (int col = 0; col < Pt::COLS; ++col) {
      const int32_t q = q0 - Pt::LOW + col;
      window[col] = q >= 0 && q < Q ? load_run<T, VEC>(y_line + q * y_step) : zero_run<T, VEC>();
    }
#pragma unroll
    for (int s = 0; s < R; ++s) {
      float tap[VEC];
      load_weights(filters + (r * R + s) * pitch, tap);
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

  CONVEXT_DEVICE void store(const float (&acc)[Pt::W][VEC], T* dx_line, bool vector_rows) const {
    if (FORM == Form::kNCHW && vector_rows) {
      float row[Pt::W];
#pragma unroll
      for (int j = 0; j < Pt::W; ++j) row[j] = acc[j][0];
      store_run<T, Pt::W>(dx_line + w0, row);
    } else {
#pragma unroll
      for (int j = 0; j < Pt::W; ++j) {
        const int32_t column = w0 + j;
        if (column >= 0 && column < problem.w) store_run<T, VEC>(dx_line + column * x_step, acc[j]);
      }
    }
  }
};

// A block's dw, (channels, R*R), to its slab: each warp adds up by shuffles, the warps through `scratch`, (warps, pitch).
template <int VEC, int R, Form FORM>
CONVEXT_DEVICE void store_slab(const float (&dw)[R][R][VEC], const DepthwiseTile& tile, const DepthwisePlace& place,
                               float* scratch, int32_t c_block, int32_t channels, float* slab) {
  // Pixels that a warp has of one lane: they are added first, by shuffles.
  const int32_t nearest = FORM == Form::kNHWC ? tile.lanes : 1, group = FORM == Form::kNHWC ? 32 / tile.lanes : 32;
  const int32_t rows = kDepthwiseThreads / tile.lanes / group;
  const int32_t columns = tile.lanes * VEC, pitch = spread<float>(columns);
#pragma unroll
  for (int tap = 0; tap < R * R; ++tap) {
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      float sum = dw[tap / R][tap % R][v];
      for (int32_t distance = nearest; distance < 32; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
      if (place.pixel % group == 0) scratch[place.pixel / group * pitch + spread<float>(place.lane * VEC + v)] = sum;
    }
    __syncthreads();  // orders the warps' shares before their sum
    for (int32_t channel = threadIdx.x; channel < columns; channel += kDepthwiseThreads) {
      float sum = 0;
      for (int32_t i = 0; i < rows; ++i) sum += scratch[i * pitch + spread<float>(channel)];
      if (c_block + channel < channels) slab[int64_t{c_block + channel} * (R * R) + tap] = sum;
    }
    __syncthreads();  // orders the sum before the next tap's shares
  }
}

template <class T, int VEC, int R, int STRIDE, Form FORM, bool DW>
__global__ void __launch_bounds__(kDepthwiseThreads, 1)
    backward(ConvProblem problem, DepthwiseTile tile, int64_t tiles_per_split, Strides xs, Strides ys,
             const T* __restrict__ dy, const T* __restrict__ x, const T* __restrict__ w, T* __restrict__ dx,
             float* __restrict__ partial, bool vector_rows) {
  using Pt = Patch<R, STRIDE>;
  using Row = PatchRow<T, VEC, R, STRIDE, FORM, DW>;
  CONVEXT_SHARED_MEMORY(shared);
  const int32_t P = problem.p(), Q = problem.q(), C = problem.c;
  const int32_t columns = tile.lanes * VEC, pitch = weight_place(columns);
  float* filters = reinterpret_cast<float*>(shared);  // (R*R, pitch)
  const int32_t c_block = static_cast<int32_t>(blockIdx.x % tile.tiles_c) * columns;
  const int32_t split = static_cast<int32_t>(blockIdx.x / tile.tiles_c);
  load_filters(filters, w, R * R, columns, c_block, dx ? C : 0);

  const DepthwisePlace place(tile, FORM == Form::kNHWC);
  const int32_t c = c_block + place.lane * VEC;
  // With NCHW the distance of columns is known: 1.
  const int64_t x_step = FORM == Form::kNCHW ? 1 : xs.w, y_step = FORM == Form::kNCHW ? 1 : ys.w;

  float dw[Row::TAPS][Row::TAPS][VEC] = {};
  for (DepthwiseWalk walk(tile, split, tiles_per_split); walk.left > 0; walk.next(tile)) {
    const DepthwisePatch at(tile, place, walk);
    const int32_t n = at.n, p0 = at.row + problem.pad_h / STRIDE;  // of the first row
    const int32_t q0 = at.column * (Pt::W / STRIDE) + problem.pad_w / STRIDE;
    const int32_t h0 = p0 * STRIDE - problem.pad_h, w0 = q0 * STRIDE - problem.pad_w;
    if (c >= C || n >= problem.n || h0 >= problem.h || w0 >= problem.w) continue;
    const int64_t x_image = n * xs.n + c * xs.c, y_image = n * ys.n + c * ys.c;
    const Row row{problem, Q, q0, w0, x_step, y_step};
#pragma unroll
    for (int i = 0; i < Pt::H; ++i) {
      const int32_t h = h0 + i;
      if (h < 0 || h >= problem.h) continue;
      const int64_t x_line = x_image + h * xs.h;
      Run<T, VEC> pixels[Pt::W];
      if constexpr (DW) row.load_pixels(x + x_line, pixels);
      float acc[Pt::W][VEC] = {};
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if ((i - r) % STRIDE != 0) continue;
        const int32_t p = p0 + (i - r) / STRIDE;
        if (p < 0 || p >= P) continue;
        row.add(r, dy + y_image + p * ys.h, filters + weight_place(place.lane * VEC), pitch, pixels, acc, dw);
      }
      if (dx) row.store(acc, dx + x_line, vector_rows);
    }
  }
  if constexpr (DW) {
    store_slab<VEC, R, FORM>(dw, tile, place, filters + R * R * pitch, c_block, C,
                             partial + int64_t{split} * C * (R * R));
  }
}

// Channels of a run: as many as keep the accumulators of dw in registers.
template <class T, int R, Form FORM>
constexpr int kRun = FORM == Form::kNCHW ? 1
                     : R == 3            ? Vector<T>::kSize
                     : R == 5            ? 4
                                         : 2;

template <class T, Form FORM>
DepthwisePlan plan_of(const ConvProblem& p) {
  constexpr int64_t kBytes = sizeof(T);
  const int vec = p.r == 3 ? kRun<T, 3, FORM> : p.r == 5 ? kRun<T, 5, FORM> : kRun<T, 7, FORM>;
  const int32_t lanes = FORM == Form::kNHWC ? channel_lanes(p, vec * kBytes) : backward_plane_lanes(p, kBytes);
  const int32_t sector = FORM == Form::kNHWC ? 0 : 32 / kBytes;  // a tile's rows start and end within one
  // Patches start at a multiple of the stride: up to stride - 1 pixels before the image.
  const int32_t height = p.h + p.pad_h % p.stride_h, width = p.w + p.pad_w % p.stride_w;
  return split_backward(
      p, choose_depthwise_tile(p.n, height, width, p.c / vec, lanes, p.stride_h, kPatchW, p.r - 1, p.s - 1 + sector),
      kBytes);
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
  const int32_t columns = plan.tile.lanes * VEC;
  const size_t shared =
      sizeof(float) * (R * R * weight_place(columns) + (DW ? kDepthwiseThreads / 32 * spread<float>(columns) : 0));
  const bool vector_rows = FORM == Form::kNCHW && p.w % kPatchW == 0 && p.pad_w % STRIDE == 0;
  return launch_kernel(backward<T, VEC, R, STRIDE, FORM, DW>, dim3(static_cast<unsigned>(plan.blocks())),
                       dim3(kDepthwiseThreads), shared, stream, p, plan.tile, plan.tiles_per_split,
                       strides_of(p.x_layout, p.c, p.h, p.w), strides_of(p.y_layout, p.k, p.p(), p.q()),
                       static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<const T*>(w),
                       static_cast<T*>(dx), static_cast<float*>(partial), vector_rows);
}

template <class T, Form FORM, bool DW>
const char* launch_backward(const ConvProblem& p, const void* dy, const void* x, const void* w, void* dx, void* partial,
                            void* stream) {
  return with_square_filter(p, [&](auto r, auto stride) {
    return launch_backward_of<T, r.value, stride.value, FORM, DW>(p, dy, x, w, dx, partial, stream);
  });
}

template <class T, Form FORM>
struct Patched {
  static constexpr Layouts LAYOUTS = FORM == Form::kNHWC ? Layouts::kNHWCOnly : Layouts::kAny;
  static constexpr auto cost = depthwise_cost;
  static const char* reject(const ConvProblem& p) { return reject_backward<T, FORM>(p); }
  static int64_t splits(const ConvProblem& p) { return plan_of<T, FORM>(p).splits; }
  template <bool DW, class... Arguments>
  static const char* launch(Arguments... arguments) {
    return launch_backward<T, FORM, DW>(arguments...);
  }
};

}  // namespace convext::cuda
