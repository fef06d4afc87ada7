// The batch-norm passes beside the convolutions: statistics, normalise + activation, and its backward. Every one is
// bound by memory.
//
//   batch_stats       mean[k], var[k] of y                                     reads y once
//   merge_stats       mean[k], var[k] from the partials of an fprop epilogue   reads 2 values a tile and channel
//   bn_act            out = act((y - mean) * scale + beta + residual)          reads y (and the residual), writes out
//   bn_act_backward   g = dout * act'(z), z recomputed from y                  reads dout, y (and the residual) twice,
//                     dbeta = sum g, dgamma = sum g * xhat                     writes dy (and dresidual)
//                     dy = gamma/std * (g - dbeta/N - xhat * dgamma/N)
//   fold              scale, shift of an epilogue from bias and batch norm
//
// One layout of threads for all reductions: a block owns `lanes` runs of neighbouring channels, 16 bytes each where
// NHWC allows it, and a range of pixels.
//
//            channels ->  | run 0 | run 1 | ... lanes |
//   pixels  row 0         |  t0   |  t1   |           |      row i takes pixels i, i + rows, ...
//     |     row 1         |  ...  |                   |
//
// Statistics go as tile/statistics.h says, whether they start here, from y in memory, or in the registers of an fprop
// kernel; merge_stats is the last step of both. Shared memory: 256*(8*2 + 1) values and room that keeps banks apart,
// 17.5 KiB (fp32). Registers: 8 means and 8 sums of squares in stats_partial, 8 scales and shifts elsewhere; the
// compiler is held to 128 in all, two blocks of 8 warps. 2 to 8 FLOP for each byte of y. The number of blocks depends
// on the problem alone. What the compiler makes of vectors (tests/cuda):
//
// @sass normalise<.*, [248]>        shared=0     warps=16 loads=16 stores=16
// @sass gradient_apply<.*, [248]>   shared=0     warps=16 loads=16 stores=16
// @sass stats_partial<.*, [248]>    shared=17920 warps=16 loads=16
// @sass gradient_partial<.*, [248]> shared=16896 warps=16 loads=16
#include <type_traits>

#include "batch_norm.h"
#include "cuda/cost.h"
#include "cuda/tile/epilogue.h"
#include "cuda/tile/statistics.h"

namespace convext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kTargetBlocks = 4 * kProcessors;

// How a problem's channels and pixels are dealt out.
struct Deal {
  int64_t pixels, channels;
  int64_t pixel_stride_outer, pixel_stride_inner, channel_stride;  // pixel = image * hw + inner
  FastDiv by_image;
  int32_t lanes, channel_blocks, splits;
  int64_t pixels_per_split;
};

Deal deal_of(const NormShape& shape, int vec) {
  Deal d{};
  const int64_t hw = shape.h * shape.w;
  d.pixels = shape.n * hw;
  d.channels = shape.c;
  const bool channels_last = shape.layout == Layout::kNHWC;
  d.pixel_stride_outer = hw * shape.c;
  d.pixel_stride_inner = channels_last ? shape.c : 1;
  d.channel_stride = channels_last ? 1 : hw;
  d.by_image = FastDiv(hw);
  d.lanes = 1;
  while (channels_last && d.lanes < 32 && d.lanes * vec < shape.c) d.lanes *= 2;
  d.channel_blocks = static_cast<int32_t>(ceil_div(shape.c, d.lanes * vec));
  const int64_t rows = kThreads / d.lanes;
  const int64_t most = ceil_div(d.pixels, 8 * rows), wanted = ceil_div(kTargetBlocks, d.channel_blocks);
  d.pixels_per_split = ceil_div(d.pixels, wanted < most ? wanted : most);
  d.splits = static_cast<int32_t>(ceil_div(d.pixels, d.pixels_per_split));
  return d;
}

// A thread's run of VEC channels, the rows of pixels, and the block's range of them, of which it takes every `rows`-th
// from `first` on.
template <int VEC>
struct Dealt {
  int32_t lane, row, rows;
  int64_t channel, first, end;

  CONVEXT_DEVICE explicit Dealt(const Deal& d)
      : lane(threadIdx.x % d.lanes),
        row(threadIdx.x / d.lanes),
        rows(kThreads / d.lanes),
        channel((int64_t{blockIdx.x} * d.lanes + lane) * VEC) {
    const int64_t begin = int64_t{blockIdx.y} * d.pixels_per_split;
    first = begin + row;
    end = begin + d.pixels_per_split < d.pixels ? begin + d.pixels_per_split : d.pixels;
  }
};

CONVEXT_DEVICE int64_t pixel_offset(const Deal& d, int64_t pixel) {
  int32_t image, inner;
  d.by_image(static_cast<uint32_t>(pixel), image, inner);
  return image * d.pixel_stride_outer + inner * d.pixel_stride_inner;
}

// VEC neighbouring values; VEC is 1 or a 16-byte vector.
template <class T, int VEC>
CONVEXT_DEVICE void load_values(const T* p, accumulate_t<T> (&v)[VEC]) {
  const Run<T, VEC> run = load_run<T, VEC>(p);
#pragma unroll
  for (int i = 0; i < VEC; ++i) v[i] = to_accumulate(run.v[i]);
}

// One row of partial statistics a split.
template <class T, int VEC>
__global__ void __launch_bounds__(kThreads, 2)
    stats_partial(Deal deal, const T* __restrict__ y, PartialStats<accumulate_t<T>> stats) {
  using Acc = accumulate_t<T>;
  CONVEXT_SHARED_MEMORY(shared);
  const auto [lane, row, rows, channel, first, end] = Dealt<VEC>(deal);
  const int32_t pitch = deal.lanes * VEC;
  Welford<Acc, VEC> seen;
  if (channel < deal.channels) {
    for (int64_t pixel = first; pixel < end; pixel += rows) {
      Acc v[VEC];
      load_values<T, VEC>(y + pixel_offset(deal, pixel) + channel * deal.channel_stride, v);
      seen.add(v);
    }
  }
  merge_block(seen, reinterpret_cast<Acc*>(shared), row, rows, lane * VEC, pitch,
              [&](int column, Acc count, Acc mean, Acc m2) {
    const int64_t k = int64_t{blockIdx.x} * pitch + column;
    if (k < deal.channels) stats.store(blockIdx.y, k, count, mean, m2);
  });
}

// Rows of partial statistics into mean and variance: a block takes 8 channels, a thread every 32nd row of one.
constexpr int kMergeColumns = 8, kMergeRows = kThreads / kMergeColumns;
template <class Acc>
__global__ void __launch_bounds__(kThreads, 1)
    merge_stats(int64_t rows, PartialStats<const Acc> stats, Acc* __restrict__ mean, Acc* __restrict__ var) {
  CONVEXT_SHARED_MEMORY(shared);
  const int32_t column = threadIdx.x % kMergeColumns, first = threadIdx.x / kMergeColumns;
  const int64_t channel = int64_t{blockIdx.x} * kMergeColumns + column;
  Welford<Acc, 1> seen;
  if (channel < stats.channels) {
    for (int64_t row = first; row < rows; row += kMergeRows) {
      const Run<Acc, 2> moments = load_run<Acc, 2>(stats.moments + (row * stats.channels + channel) * 2);
      seen.join(__ldg(stats.counts + row), moments.v[0], moments.v[1]);
    }
  }
  merge_block(seen, reinterpret_cast<Acc*>(shared), first, kMergeRows, column, kMergeColumns,
              [&](int i, Acc count, Acc joined_mean, Acc m2) {
    const int64_t k = int64_t{blockIdx.x} * kMergeColumns + i;
    if (k < stats.channels) mean[k] = joined_mean, var[k] = m2 / count;
  });
}

// What normalising one channel takes.
template <class Acc>
struct Affine {
  Acc mean, inv_std, gamma, beta;
};
template <class Acc>
CONVEXT_DEVICE Affine<Acc> affine_of(const NormParameters& p, int64_t k) {
  const auto read = [&](const void* data, Acc otherwise) {
    return data ? __ldg(static_cast<const Acc*>(data) + k) : otherwise;
  };
  using std::sqrt;
  return {read(p.mean, 0), Acc(1) / sqrt(read(p.var, 1) + Acc(p.eps)), read(p.gamma, 1), read(p.beta, 0)};
}

// VEC neighbouring values of an array by channel, 16 bytes a load where it starts so; `otherwise` where there is none.
template <class Acc, int VEC>
CONVEXT_DEVICE void load_parameters(const void* array, int64_t k, Acc otherwise, Acc (&into)[VEC]) {
  if (array) {
    load_channels(static_cast<const Acc*>(array) + k, Span{0, 1, 0, 1, VEC, true}, into);
  } else {
#pragma unroll
    for (int i = 0; i < VEC; ++i) into[i] = otherwise;
  }
}

template <class Acc, int VEC>
CONVEXT_DEVICE void load_affine(const NormParameters& p, int64_t k, Affine<Acc> (&affine)[VEC]) {
  Acc mean[VEC], var[VEC], gamma[VEC], beta[VEC];
  load_parameters<Acc>(p.mean, k, 0, mean);
  load_parameters<Acc>(p.var, k, 1, var);
  load_parameters<Acc>(p.gamma, k, 1, gamma);
  load_parameters<Acc>(p.beta, k, 0, beta);
  using std::sqrt;
#pragma unroll
  for (int i = 0; i < VEC; ++i) affine[i] = {mean[i], Acc(1) / sqrt(var[i] + Acc(p.eps)), gamma[i], beta[i]};
}

template <class T, int VEC>
__global__ void __launch_bounds__(kThreads, 2)
    normalise(Deal deal, NormParameters parameters, Activation activation, const T* __restrict__ y,
              const T* __restrict__ residual, T* __restrict__ out) {
  using Acc = accumulate_t<T>;
  const auto [lane, row, rows, channel, first, end] = Dealt<VEC>(deal);
  if (channel >= deal.channels) return;
  Affine<Acc> affine[VEC];
  load_affine(parameters, channel, affine);
  for (int64_t pixel = first; pixel < end; pixel += rows) {
    const int64_t offset = pixel_offset(deal, pixel) + channel * deal.channel_stride;
    Acc v[VEC], r[VEC] = {};
    load_values<T, VEC>(y + offset, v);
    if (residual) load_values<T, VEC>(residual + offset, r);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      v[i] = (v[i] - affine[i].mean) * (affine[i].inv_std * affine[i].gamma) + affine[i].beta + r[i];
    }
    visit_activation<Acc>(activation, [&](auto f) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) v[i] = f.forward(v[i]);
    });
    store_run<T, VEC>(out + offset, v);
  }
}

// g = dout * act'(z) of VEC elements, and their normalised values.
template <class T, int VEC>
CONVEXT_DEVICE void activation_gradient(const Affine<accumulate_t<T>> (&affine)[VEC], Activation activation,
                                        const T* dout, const T* y, const T* residual, int64_t offset,
                                        accumulate_t<T> (&g)[VEC], accumulate_t<T> (&xhat)[VEC]) {
  using Acc = accumulate_t<T>;
  Acc z[VEC] = {};
  load_values<T, VEC>(dout + offset, g);
  load_values<T, VEC>(y + offset, xhat);
  if (residual) load_values<T, VEC>(residual + offset, z);
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    xhat[i] = (xhat[i] - affine[i].mean) * affine[i].inv_std;
    z[i] += xhat[i] * affine[i].gamma + affine[i].beta;
  }
  visit_activation<Acc>(activation, [&](auto f) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) g[i] *= f.derivative(z[i]);
  });
}

// partial: (splits, channels, 2): sums of g and of g * xhat.
template <class T, int VEC>
__global__ void __launch_bounds__(kThreads, 2)
    gradient_partial(Deal deal, NormParameters parameters, Activation activation, const T* __restrict__ dout,
                     const T* __restrict__ y, const T* __restrict__ residual, accumulate_t<T>* __restrict__ partial) {
  using Acc = accumulate_t<T>;
  CONVEXT_SHARED_MEMORY(shared);
  const auto [lane, row, rows, channel, first, end] = Dealt<VEC>(deal);
  const int32_t columns = deal.lanes * VEC, pitch = spread<Acc>(columns);
  Acc* sums = reinterpret_cast<Acc*>(shared);  // (rows, pitch), of g
  Acc* products = sums + rows * pitch;         // of g * xhat
  Acc sum[VEC] = {}, product[VEC] = {};
  if (channel < deal.channels) {
    Affine<Acc> affine[VEC];
    load_affine(parameters, channel, affine);
    for (int64_t pixel = first; pixel < end; pixel += rows) {
      Acc g[VEC], xhat[VEC];
      activation_gradient<T, VEC>(affine, activation, dout, y, residual,
                                  pixel_offset(deal, pixel) + channel * deal.channel_stride, g, xhat);
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        sum[i] += g[i];
        product[i] += g[i] * xhat[i];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    sums[row * pitch + spread<Acc>(lane * VEC + i)] = sum[i];
    products[row * pitch + spread<Acc>(lane * VEC + i)] = product[i];
  }
  __syncthreads();  // orders the threads' sums before they are added up
  for (int32_t i = threadIdx.x; i < columns; i += kThreads) {
    const int64_t k = int64_t{blockIdx.x} * columns + i;
    if (k >= deal.channels) continue;
    Acc total = 0, total_product = 0;
    for (int32_t r = 0; r < rows; ++r) {
      total += sums[r * pitch + spread<Acc>(i)];
      total_product += products[r * pitch + spread<Acc>(i)];
    }
    store_run<Acc, 2>(partial + (int64_t{blockIdx.y} * deal.channels + k) * 2, {total, total_product});
  }
}

template <class Acc>
__global__ void __launch_bounds__(kThreads, 1)
    gradient_final(Deal deal, const Acc* __restrict__ partial, Acc* __restrict__ dgamma, Acc* __restrict__ dbeta) {
  const int64_t k = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (k >= deal.channels) return;
  Acc sum = 0, product = 0;
  for (int32_t split = 0; split < deal.splits; ++split) {
    const Run<Acc, 2> p = load_run<Acc, 2>(partial + (split * deal.channels + k) * 2);
    sum += p.v[0];
    product += p.v[1];
  }
  dgamma[k] = product;
  dbeta[k] = sum;
}

template <class T, int VEC>
__global__ void __launch_bounds__(kThreads, 2)
    gradient_apply(Deal deal, NormParameters parameters, Activation activation, bool training,
                   const T* __restrict__ dout, const T* __restrict__ y, const T* __restrict__ residual,
                   const accumulate_t<T>* __restrict__ dgamma, const accumulate_t<T>* __restrict__ dbeta,
                   T* __restrict__ dy, T* __restrict__ dresidual) {
  using Acc = accumulate_t<T>;
  const auto [lane, row, rows, channel, first, end] = Dealt<VEC>(deal);
  if (channel >= deal.channels) return;
  Affine<Acc> affine[VEC];
  load_affine(parameters, channel, affine);
  Acc mean_g[VEC] = {}, mean_product[VEC] = {};  // zero with running statistics, which do not depend on y
  if (training) {
    load_parameters<Acc>(dbeta, channel, 0, mean_g);
    load_parameters<Acc>(dgamma, channel, 0, mean_product);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      mean_g[i] /= Acc(deal.pixels);
      mean_product[i] /= Acc(deal.pixels);
    }
  }
  for (int64_t pixel = first; pixel < end; pixel += rows) {
    const int64_t offset = pixel_offset(deal, pixel) + channel * deal.channel_stride;
    Acc g[VEC], xhat[VEC];
    activation_gradient<T, VEC>(affine, activation, dout, y, residual, offset, g, xhat);
    if (dresidual) store_run<T, VEC>(dresidual + offset, g);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      g[i] = affine[i].gamma * affine[i].inv_std * (g[i] - mean_g[i] - xhat[i] * mean_product[i]);
    }
    store_run<T, VEC>(dy + offset, g);
  }
}

// scale = gamma / sqrt(var + eps), shift = beta + (bias - mean) * scale, channel by channel.
template <class Acc>
__global__ void __launch_bounds__(kThreads, 1)
    fold(int64_t channels, NormParameters parameters, const Acc* __restrict__ bias, Acc* __restrict__ scale,
         Acc* __restrict__ shift) {
  const int64_t k = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (k >= channels) return;
  const Affine<Acc> affine = affine_of<Acc>(parameters, k);
  scale[k] = affine.gamma * affine.inv_std;
  shift[k] = affine.beta + ((bias ? __ldg(bias + k) : Acc(0)) - affine.mean) * scale[k];
}

// Calls f(T{}, integral constant VEC): 16-byte vectors where NHWC and the channel count allow them.
template <class F>
const char* dispatch(const NormShape& shape, F&& f) {
  const auto with = [&](auto element) {
    using T = decltype(element);
    constexpr int VEC = Vector<T>::kSize;
    if (shape.layout == Layout::kNHWC && shape.c % VEC == 0) return f(element, std::integral_constant<int, VEC>{});
    return f(element, std::integral_constant<int, 1>{});
  };
  switch (shape.dtype) {
    case DType::kFloat32: return with(float{});
    case DType::kFloat64: return with(double{});
    case DType::kBFloat16: return with(bf16{});
    default: return with(fp16{});
  }
}

int vector_size(const NormShape& shape) {
  const int vec = static_cast<int>(16 / dtype_size(shape.dtype));
  return shape.layout == Layout::kNHWC && shape.c % vec == 0 ? vec : 1;
}
dim3 grid_of(const Deal& d) { return dim3(d.channel_blocks, d.splits); }
dim3 channel_grid(int64_t channels) { return dim3(static_cast<unsigned>(ceil_div(channels, kThreads))); }

}  // namespace

const char* reject_norm(const NormShape& shape) {
  if (shape.n * shape.h * shape.w > INT32_MAX) return "there are more than 2^31 pixels";
  if (shape.n * shape.h * shape.w == 0 || shape.c == 0) return "there is nothing to normalise";
  return nullptr;
}

int64_t norm_workspace(const NormShape& shape) {
  const Deal deal = deal_of(shape, vector_size(shape));
  return partial_stats_bytes(deal.splits, deal.channels, accumulate_dtype(shape.dtype));
}

const char* launch_merge_stats(int64_t channels, int64_t rows, DType accumulate, const void* partial, void* mean,
                               void* var, void* stream) {
  const auto with = [&](auto zero) {
    using Acc = decltype(zero);
    const dim3 grid(static_cast<unsigned>(ceil_div(channels, kMergeColumns)));
    return launch_kernel(merge_stats<Acc>, grid, dim3(kThreads), sizeof(Acc) * merge_scratch(kMergeRows, kMergeColumns),
                         stream, rows, PartialStats<const Acc>(partial, rows, channels), static_cast<Acc*>(mean),
                         static_cast<Acc*>(var));
  };
  return accumulate == DType::kFloat64 ? with(double{}) : with(float{});
}

const char* launch_batch_stats(const NormShape& shape, const void* y, void* mean, void* var, void* workspace,
                               void* stream) {
  return dispatch(shape, [&](auto element, auto vec) -> const char* {
    using T = decltype(element);
    using Acc = accumulate_t<T>;
    constexpr int VEC = decltype(vec)::value;
    const Deal deal = deal_of(shape, VEC);
    if (const char* error =
            launch_kernel(stats_partial<T, VEC>, grid_of(deal), dim3(kThreads),
                          sizeof(Acc) * merge_scratch(kThreads / deal.lanes, deal.lanes * VEC), stream, deal,
                          static_cast<const T*>(y), PartialStats<Acc>(workspace, deal.splits, shape.c))) {
      return error;
    }
    return launch_merge_stats(shape.c, deal.splits, accumulate_dtype(shape.dtype), workspace, mean, var, stream);
  });
}

const char* launch_bn_act(const NormShape& shape, const NormParameters& parameters, Activation activation,
                          const void* y, const void* residual, void* out, void* stream) {
  return dispatch(shape, [&](auto element, auto vec) -> const char* {
    using T = decltype(element);
    constexpr int VEC = decltype(vec)::value;
    const Deal deal = deal_of(shape, VEC);
    return launch_kernel(normalise<T, VEC>, grid_of(deal), dim3(kThreads), 0, stream, deal, parameters, activation,
                         static_cast<const T*>(y), static_cast<const T*>(residual), static_cast<T*>(out));
  });
}

const char* launch_bn_act_backward(const NormShape& shape, const NormParameters& parameters, Activation activation,
                                   bool training, const void* dout, const void* y, const void* residual, void* dy,
                                   void* dgamma, void* dbeta, void* dresidual, void* workspace, void* stream) {
  return dispatch(shape, [&](auto element, auto vec) -> const char* {
    using T = decltype(element);
    using Acc = accumulate_t<T>;
    constexpr int VEC = decltype(vec)::value;
    const Deal deal = deal_of(shape, VEC);
    Acc* partial = static_cast<Acc*>(workspace);
    const char* error = launch_kernel(gradient_partial<T, VEC>, grid_of(deal), dim3(kThreads),
                                      sizeof(Acc) * 2 * (kThreads / deal.lanes) * spread<Acc>(deal.lanes * VEC), stream,
                                      deal, parameters, activation, static_cast<const T*>(dout),
                                      static_cast<const T*>(y), static_cast<const T*>(residual), partial);
    if (error) return error;
    error = launch_kernel(gradient_final<Acc>, channel_grid(shape.c), dim3(kThreads), 0, stream, deal,
                          static_cast<const Acc*>(partial), static_cast<Acc*>(dgamma), static_cast<Acc*>(dbeta));
    if (error) return error;
    return launch_kernel(gradient_apply<T, VEC>, grid_of(deal), dim3(kThreads), 0, stream, deal, parameters, activation,
                         training, static_cast<const T*>(dout), static_cast<const T*>(y),
                         static_cast<const T*>(residual), static_cast<const Acc*>(dgamma),
                         static_cast<const Acc*>(dbeta), static_cast<T*>(dy), static_cast<T*>(dresidual));
  });
}

const char* launch_fold(int64_t channels, DType accumulate, const NormParameters& parameters, const void* bias,
                        void* scale, void* shift, void* stream) {
  const auto with = [&](auto zero) {
    using Acc = decltype(zero);
    return launch_kernel(fold<Acc>, channel_grid(channels), dim3(kThreads), 0, stream, channels, parameters,
                         static_cast<const Acc*>(bias), static_cast<Acc*>(scale), static_cast<Acc*>(shift));
  };
  return accumulate == DType::kFloat64 ? with(double{}) : with(float{});
}

}  // namespace convext::cuda
