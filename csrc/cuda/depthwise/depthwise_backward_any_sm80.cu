// Depthwise convolution, backward, any filter, stride, dilation, multiplier and memory order, and float64: both
// gradients in one pass over x and dy (depthwise_backward.h).
//
//   dx[n,h,w,c] = sum_{r,s} dy[n,p,q,c] * w[c,r,s]        dw[c,r,s] = sum_{n,h,w} dy[n,p,q,c] * x[n,h,w,c]
//
// backward_any<T, VEC, DW>: a thread owns VEC channels and, at a time, 4 input pixels, `across_w` apart, so that
//   neighbouring threads have neighbouring ones:
//
//       x    | t0 t1 t2 t3 | t0 t1 t2 t3 | t0 ...          for each tap: the output pixel that it meets, or none
//
//   Taps are a loop at run time, so a thread's share of dw lies in shared memory: R*S*256*VEC*4 B, 72 KiB for a dilated
//   3x3 with 8 channels in bf16 -> 2 blocks on 228 KiB. Larger filters take fewer channels a thread, and more taps than
//   kEntryBudget holds take further passes over x and dy. Registers: 4*VEC pixels of x and 4*VEC sums of dx, 64 at 8
//   channels, beside addresses. A thread does 4 pixels for each tap and access to its share.
//
// 36 FLOP for 6 bytes at 3x3 in bf16. Chosen where depthwise_backward_window_sm80.cu and ..._planes_sm80.cu reject.
#include <type_traits>

#include "depthwise_backward.h"

namespace convext::cuda {
namespace {

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

// What every thread of a block knows: the problem, and where it stands.
template <class T, int VEC, bool DW>
struct AnyBlock {
  using Acc = accumulate_t<T>;
  const ConvProblem& problem;
  const DepthwiseTile& tile;
  const Strides &xs, &ys;
  const FastDiv &stride_h, &stride_w;
  const Entries& entries;
  Acc* shares;   // (entries, VEC, threads): of dw
  Acc* filters;  // (R*S, pitch), for whole vectors
  int32_t Q, multiplier, taps, columns, pitch, c_block;
  bool channels_last;

  CONVEXT_DEVICE AnyBlock(const ConvProblem& p, const DepthwiseTile& t, const Strides& x, const Strides& y,
                          const FastDiv& by_h, const FastDiv& by_w, const Entries& e, unsigned char* shared)
      : problem(p),
        tile(t),
        xs(x),
        ys(y),
        stride_h(by_h),
        stride_w(by_w),
        entries(e),
        shares(reinterpret_cast<Acc*>(shared)),
        filters(shares + (DW ? (e.end - e.begin) * VEC * kDepthwiseThreads : 0)),
        Q(p.q()),
        multiplier(p.k / p.c),
        taps(p.r * p.s),
        columns(t.lanes * VEC),
        pitch(weight_place(columns)),
        c_block(static_cast<int32_t>(blockIdx.x % t.tiles_c) * columns),
        channels_last(p.x_layout == Layout::kNHWC) {}

  CONVEXT_DEVICE Acc& share(int32_t entry, int v) const {
    return shares[((entry - entries.begin) * VEC + v) * kDepthwiseThreads + threadIdx.x];
  }

  // Zeros for the shares, and the filters of whole vectors.
  CONVEXT_DEVICE void start(const T* w, bool wants_dx) const {
    if constexpr (DW) {
      for (int32_t e = entries.begin; e < entries.end; ++e) {
#pragma unroll
        for (int v = 0; v < VEC; ++v) share(e, v) = 0;
      }
    }
    if constexpr (VEC > 1) {
      load_filters(filters, w, taps, columns, c_block, wants_dx ? problem.c : 0);
    }
  }

  // What one row of dy, `y_line`, adds through filter row r of filter c*multiplier + m to a thread's pixels, at columns
  // column_of(j), and they to its share of dw.
  template <class Columns>
  CONVEXT_DEVICE void add_row(const T* y_line, int32_t m, int32_t k, int32_t r, int32_t lane, const T* w, bool wants_dx,
                              const Columns& column_of, const Acc (&pixels)[kPatchW][VEC],
                              Acc (&acc)[kPatchW][VEC]) const {
    for (int32_t s = 0; s < problem.s; ++s) {
      const int32_t tap = r * problem.s + s, entry = m * taps + tap;
      const bool counts = DW && entry >= entries.begin && entry < entries.end;
      if (!wants_dx && !counts) continue;
      Acc weight[VEC] = {}, sum[VEC] = {};
      if constexpr (VEC > 1) load_weights(filters + tap * pitch + weight_place(lane * VEC), weight);
      else if (wants_dx) weight[0] = to_accumulate(__ldg(w + int64_t{k} * taps + tap));
#pragma unroll
      for (int j = 0; j < kPatchW; ++j) {
        const int32_t q =
            column_of(j) < problem.w ? output_of(column_of(j), s, stride_w, problem.pad_w, problem.dil_w, Q) : -1;
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

  // The sums of the threads' shares, to the block's slab.
  CONVEXT_DEVICE void store_slab(Acc* slab) const {
    __syncthreads();  // orders the threads' shares before their sum
    const int32_t pixels = kDepthwiseThreads / tile.lanes;
    const int32_t next_pixel = channels_last ? tile.lanes : 1, next_lane = channels_last ? 1 : pixels;
    for (int32_t i = threadIdx.x; i < (entries.end - entries.begin) * columns; i += kDepthwiseThreads) {
      // Of the entries of this launch. Neighbouring threads have neighbouring lanes, and begin at pixels of their own:
      // so their banks differ.
      const int32_t entry = i / columns, v = i % columns / tile.lanes, lane = i % tile.lanes;
      const int32_t column = lane * VEC + v, turn = entry * tile.lanes + lane + v;
      if (c_block + column >= problem.c) continue;
      const Acc* row = shares + (entry * VEC + v) * kDepthwiseThreads + lane * next_lane;
      Acc sum = 0;
      for (int32_t pixel = 0; pixel < pixels; ++pixel) sum += row[((pixel + turn) & (pixels - 1)) * next_pixel];
      const int32_t m = (entries.begin + entry) / taps, tap = (entries.begin + entry) % taps;
      slab[(int64_t{c_block + column} * multiplier + m) * taps + tap] = sum;
    }
  }
};

template <class T, int VEC, bool DW>
__global__ void __launch_bounds__(kDepthwiseThreads, 1)
    backward_any(ConvProblem problem, DepthwiseTile tile, int64_t tiles_per_split, Strides xs, Strides ys,
                 FastDiv stride_h, FastDiv stride_w, Entries entries, const T* __restrict__ dy, const T* __restrict__ x,
                 const T* __restrict__ w, T* __restrict__ dx, accumulate_t<T>* __restrict__ partial) {
  using Acc = accumulate_t<T>;
  CONVEXT_SHARED_MEMORY(shared);
  const AnyBlock<T, VEC, DW> block(problem, tile, xs, ys, stride_h, stride_w, entries, shared);
  const int32_t P = problem.p(), split = static_cast<int32_t>(blockIdx.x / tile.tiles_c);
  const DepthwisePlace place(tile, block.channels_last);
  const int32_t c = block.c_block + place.lane * VEC;
  block.start(w, dx);

  for (DepthwiseWalk walk(tile, split, tiles_per_split); walk.left > 0; walk.next(tile)) {
    const DepthwisePatch at(tile, place, walk);
    const int32_t h = at.row, n = at.n;
    if (c >= problem.c || n >= problem.n || h >= problem.h) continue;
    // A thread's pixels lie across_w apart, so that neighbouring threads have neighbouring pixels.
    const auto column_of = [&](int j) { return (walk.w * kPatchW + j) * tile.across_w + place.w; };
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
    for (int32_t m = 0; m < block.multiplier; ++m) {
      const int32_t k = VEC == 1 ? c * block.multiplier + m : c;  // whole vectors have multiplier 1
      for (int32_t r = 0; r < problem.r; ++r) {
        const int32_t p = output_of(h, r, stride_h, problem.pad_h, problem.dil_h, P);
        if (p < 0) continue;
        block.add_row(dy + n * ys.n + p * ys.h + k * ys.c, m, k, r, place.lane, w, dx, column_of, pixels, acc);
      }
    }
    if (!dx) continue;
#pragma unroll
    for (int j = 0; j < kPatchW; ++j) {
      if (column_of(j) < problem.w) store_run<T, VEC>(dx + x_line + column_of(j) * xs.w, acc[j]);
    }
  }
  if constexpr (DW) block.store_slab(partial + int64_t{split} * problem.k * block.taps);
}

// Shared memory that every GPU from compute capability 8.0 on lets a block ask for, nearly.
constexpr int64_t kEntryBudget = 96 * 1024;

// What an entry takes of it: the threads' shares of dw, and for whole vectors the filters of the block's channels.
template <class T, int VEC>
constexpr int64_t entry_bytes(bool dw) {
  return (dw ? kDepthwiseThreads * VEC : 0) * static_cast<int64_t>(sizeof(accumulate_t<T>)) +
         (VEC > 1 ? weight_place(128 / sizeof(T)) * sizeof(accumulate_t<T>) : 0);
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
  return split_backward(p,
                        choose_depthwise_tile(p.n, p.h, p.w, static_cast<int32_t>(ceil_div(p.c, vec)), lanes, 1,
                                              kPatchW, p.dil_h * (p.r - 1), p.dil_w * (p.s - 1) + sector),
                        kBytes);
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
          backward_any<T, VEC, DW>, dim3(static_cast<unsigned>(plan.blocks())), dim3(kDepthwiseThreads),
          static_cast<size_t>((part.end - part.begin) * entry_bytes<T, VEC>(DW)), stream, p, plan.tile,
          plan.tiles_per_split, strides_of(p.x_layout, p.c, p.h, p.w), strides_of(p.y_layout, p.k, p.p(), p.q()),
          FastDiv(p.stride_h), FastDiv(p.stride_w), part, static_cast<const T*>(dy), static_cast<const T*>(x),
          static_cast<const T*>(w), static_cast<T*>(begin == 0 ? dx : nullptr), static_cast<accumulate_t<T>*>(partial));
      if (error) return error;
      begin = part.end;
    } while (begin < entries);
    return nullptr;
  });
}

template <class T>
struct General {
  static constexpr Layouts LAYOUTS = Layouts::kAny;
  static constexpr auto cost = any_depthwise_cost;
  static const char* reject(const ConvProblem& p) { return reject_any(p); }
  static int64_t splits(const ConvProblem& p) {
    return with_channels<T>(p, true, [&](auto channels) { return plan_any<T>(p, decltype(channels)::value).splits; });
  }
  template <bool DW, class... Arguments>
  static const char* launch(Arguments... arguments) {
    return launch_any<T, DW>(arguments...);
  }
};

}  // namespace
}  // namespace convext::cuda

namespace convext {
CONVEXT_DEPTHWISE(cuda::bf16, bf16, any, cuda::General<cuda::bf16>)
CONVEXT_DEPTHWISE(cuda::fp16, f16, any, cuda::General<cuda::fp16>)
CONVEXT_DEPTHWISE(float, f32, any, cuda::General<float>)
CONVEXT_DEPTHWISE(double, f64, any, cuda::General<double>)
}  // namespace convext
