// Direct convolution without tensor cores, all passes, fp32 and fp64: where tf32 is not allowed, and for gradcheck.
//
//           C                      A (gemm_m, gemm_k)            B (gemm_k, gemm_n)
//   fprop   y  (NPQ, K)            im2col(x)  (NPQ, RSC)         w  (RSC, K)
//   dgrad   dx (NHW, C)            dy         (NHW, RSK)         w  (RSK, C)
//   wgrad   dw (K, RSC), slabs     dy         (K, NPQ)           im2col(x) (NPQ, RSC)
//
//   tile 64 x 64 x 16, 256 threads of 4 x 4 outputs:       +--------+ 64
//   each k step of a thread reads 4 + 4 values from        | t0 t1 .|
//   shared memory, 2 vector loads, and does 16 FMA         | t16    |
//   Shared memory: 2 * 16 * (64 + 4) * 2 buffers * 4 B = 17 KiB (fp32), 34 KiB (fp64). Registers: 16 accumulators and
//   8 values of the next tile, loaded while the current one is multiplied. Batch statistics of fprop reuse the shared
//   memory: 16*(2*64 + 1) values.
//
// The FMA units decide: one block does 4 FLOP for each byte of shared memory read, 16 for each byte loaded. Operands
// are gathered one element at a time from any strides, so any layout, channel count and group count is served.
#include "cuda/cost.h"
#include "cuda/tile/epilogue.h"
#include "cuda/tile/reduce_splits.h"
#include "cuda/tile/statistics.h"
#include "cuda/tile/strides.h"

namespace convext::cuda {
namespace {

constexpr int kThreads = 256, kBlock = 64, kBlockK = 16, kPitch = kBlock + 4, kPerThread = 4;
constexpr int kLoads = kBlock * kBlockK / kThreads;  // elements of each operand a thread loads for a tile
constexpr int64_t kTargetBlocks = 2 * kProcessors;

// Everything that reading an element of A or B takes; the same for all threads.
template <class T>
struct Operands {
  ConvProblem problem;
  Strides x_strides, y_strides;
  const T *x, *dy, *w;           // those that the pass reads
  FastDiv by_image, by_row;      // a row of pixels: of y, for dgrad of x
  FastDiv by_channels, by_taps;  // the reduction (r, s, channel) and the columns (r, s, c)

  Operands(Pass pass, const ConvProblem& p, const LaunchArgs& args)
      : problem(p),
        x_strides(strides_of(p.x_layout, p.c, p.h, p.w)),
        y_strides(strides_of(p.y_layout, p.k, p.p(), p.q())),
        x(static_cast<const T*>(pass == Pass::kFprop   ? args.a
                                : pass == Pass::kWgrad ? args.b
                                                       : nullptr)),
        dy(static_cast<const T*>(pass == Pass::kFprop ? nullptr : args.a)),
        w(static_cast<const T*>(pass == Pass::kWgrad ? nullptr : args.b)),
        by_image(pass == Pass::kDgrad ? int64_t{p.h} * p.w : int64_t{p.p()} * p.q()),
        by_row(pass == Pass::kDgrad ? p.w : p.q()),
        by_channels(pass == Pass::kDgrad ? p.k_per_group() : p.c_per_group()),
        by_taps(p.s) {}

  CONVEXT_DEVICE void pixel(int64_t m, int32_t& n, int32_t& row, int32_t& col) const {
    int32_t rest;
    by_image(static_cast<uint32_t>(m), n, rest);
    by_row(static_cast<uint32_t>(rest), row, col);
  }
  CONVEXT_DEVICE void tap(int64_t i, int32_t& r, int32_t& s, int32_t& channel) const {
    int32_t both;
    by_channels(static_cast<uint32_t>(i), both, channel);
    by_taps(static_cast<uint32_t>(both), r, s);
  }

  // im2col(x): output pixel m, tap and channel i.
  CONVEXT_DEVICE T x_at(int32_t group, int64_t m, int64_t i) const {
    int32_t n, p, q, r, s, c;
    pixel(m, n, p, q);
    tap(i, r, s, c);
    const int32_t h = problem.h_of(p, r), column = problem.w_of(q, s);
    if (h < 0 || h >= problem.h || column < 0 || column >= problem.w) return T(0);
    return __ldg(x + n * x_strides.n + h * x_strides.h + column * x_strides.w +
                 (int64_t{group} * problem.c_per_group() + c) * x_strides.c);
  }
  // dy around input pixel m, tap and filter i.
  CONVEXT_DEVICE T dy_around(int32_t group, int64_t m, int64_t i) const {
    int32_t n, h, column, r, s, k;
    pixel(m, n, h, column);
    tap(i, r, s, k);
    const int32_t up = h + problem.pad_h - r * problem.dil_h, left = column + problem.pad_w - s * problem.dil_w;
    if (up < 0 || left < 0 || up % problem.stride_h || left % problem.stride_w) return T(0);
    const int32_t p = up / problem.stride_h, q = left / problem.stride_w;
    if (p >= problem.p() || q >= problem.q()) return T(0);
    return __ldg(dy + n * y_strides.n + p * y_strides.h + q * y_strides.w +
                 (int64_t{group} * problem.k_per_group() + k) * y_strides.c);
  }
  CONVEXT_DEVICE T dy_at(int32_t group, int64_t m, int64_t k) const {
    int32_t n, p, q;
    pixel(m, n, p, q);
    return __ldg(dy + n * y_strides.n + p * y_strides.h + q * y_strides.w +
                 (int64_t{group} * problem.k_per_group() + k) * y_strides.c);
  }

  template <Pass PASS>
  CONVEXT_DEVICE T a(int32_t group, int64_t m, int64_t k) const {
    if constexpr (PASS == Pass::kFprop) return x_at(group, m, k);
    if constexpr (PASS == Pass::kDgrad) return dy_around(group, m, k);
    return dy_at(group, k, m);
  }
  template <Pass PASS>
  CONVEXT_DEVICE T b(int32_t group, int64_t k, int64_t n) const {
    const int64_t cg = problem.c_per_group(), kg = problem.k_per_group(), filter = cg * problem.r * problem.s;
    if constexpr (PASS == Pass::kFprop) return __ldg(w + (group * kg + n) * filter + k);
    if constexpr (PASS == Pass::kWgrad) return x_at(group, k, n);
    int32_t r, s, channel;
    tap(k, r, s, channel);
    return __ldg(w + (group * kg + channel) * filter + (int64_t{r} * problem.s + s) * cg + n);
  }
};

// A block's tile: which part of the product it is, and bringing A and B into shared memory, which takes the way by
// registers so that the next part of both is loaded while the one before is multiplied.
template <class T, Pass PASS>
struct SimtLoader {
  // Neighbouring threads load what lies side by side: channels, which are the reduction of fprop and of dgrad's A.
  static constexpr bool A_ALONG_K = PASS != Pass::kWgrad, B_ALONG_K = PASS == Pass::kFprop;

  const Operands<T>& operands;
  const GemmShape gemm;
  const int32_t group;
  const int64_t m0, n0, k_end;
  T *a_tiles, *b_tiles;  // 2 x (kBlockK, kPitch) each
  T a_next[kLoads], b_next[kLoads];

  static CONVEXT_DEVICE void place(bool along_k, int i, int& mn, int& k) {
    const int index = threadIdx.x + i * kThreads;
    mn = along_k ? index / kBlockK : index % kBlock;
    k = along_k ? index % kBlockK : index / kBlock;
  }
  CONVEXT_DEVICE void fetch(int64_t k0) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      int m, k, n;
      place(A_ALONG_K, i, m, k);
      a_next[i] = m0 + m < gemm.m && k0 + k < k_end ? operands.template a<PASS>(group, m0 + m, k0 + k) : T(0);
      place(B_ALONG_K, i, n, k);
      b_next[i] = n0 + n < gemm.n && k0 + k < k_end ? operands.template b<PASS>(group, k0 + k, n0 + n) : T(0);
    }
  }
  CONVEXT_DEVICE void store(int buffer) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      int m, k, n;
      place(A_ALONG_K, i, m, k);
      a_tiles[(buffer * kBlockK + k) * kPitch + m] = a_next[i];
      place(B_ALONG_K, i, n, k);
      b_tiles[(buffer * kBlockK + k) * kPitch + n] = b_next[i];
    }
  }
};

// One buffer of A times one of B, for a thread's outputs.
template <class T>
CONVEXT_DEVICE void multiply(const T* a_tile, const T* b_tile, T (&acc)[kPerThread][kPerThread]) {
#pragma unroll
  for (int k = 0; k < kBlockK; ++k) {
    T a[kPerThread], b[kPerThread];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      a[i] = a_tile[k * kPitch + i];
      b[i] = b_tile[k * kPitch + i];
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) acc[i][j] += a[i] * b[j];
    }
  }
}

// One block a multiprocessor is all that is asked for: for two, fp64 spilled or did not as ptxas happened to number it.
template <class T, Pass PASS>
__global__ void __launch_bounds__(kThreads, 1)
    simt(Operands<T> operands, int64_t k_per_split, T* __restrict__ out, Epilogue epilogue, PartialStats<T> stats) {
  CONVEXT_SHARED_MEMORY(shared);
  T* a_tiles = reinterpret_cast<T*>(shared);    // 2 x (kBlockK, kPitch)
  T* b_tiles = a_tiles + 2 * kBlockK * kPitch;  // 2 x (kBlockK, kPitch)
  const ConvProblem& problem = operands.problem;
  const GemmShape gemm = problem.gemm_shape(PASS);
  const int tid = threadIdx.x;
  const int32_t group = blockIdx.y;
  const int64_t n_tiles = ceil_div(gemm.n, kBlock);
  const int64_t m0 = blockIdx.x / n_tiles * kBlock, n0 = blockIdx.x % n_tiles * kBlock;
  const int64_t k_begin = blockIdx.z * k_per_split;
  const int64_t k_end = k_begin + k_per_split < gemm.k ? k_begin + k_per_split : gemm.k;

  const int m_thread = tid / 16 * kPerThread, n_thread = tid % 16 * kPerThread;
  T acc[kPerThread][kPerThread] = {};
  SimtLoader<T, PASS> loader{operands, gemm, group, m0, n0, k_end, a_tiles, b_tiles, {}, {}};
  loader.fetch(k_begin);
  int buffer = 0;
  for (int64_t k0 = k_begin; k0 < k_end; k0 += kBlockK, buffer ^= 1) {
    loader.store(buffer);
    __syncthreads();  // the tile is whole; the other buffer was read before the previous barrier's successor
    if (k0 + kBlockK < k_end) loader.fetch(k0 + kBlockK);
    const int at = buffer * kBlockK * kPitch;
    multiply(a_tiles + at + m_thread, b_tiles + at + n_thread, acc);
  }

  Welford<T, kPerThread> seen;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t m = m0 + m_thread + i, n = n0 + n_thread;
    if (m >= gemm.m || n >= gemm.n) break;
    Span span{static_cast<int32_t>(group * gemm.n + n), 1, 0, 1, static_cast<int32_t>(gemm.n - n), false};
    if constexpr (PASS == Pass::kWgrad) {
      span.offset = (blockIdx.z * int64_t{problem.k} + int64_t{group} * gemm.m + m) * gemm.n + n;
    } else {
      const Strides& strides = PASS == Pass::kFprop ? operands.y_strides : operands.x_strides;
      int32_t image, row, col;
      operands.pixel(m, image, row, col);
      span.step = strides.c;
      span.offset = image * strides.n + row * strides.h + col * strides.w + (group * gemm.n + n) * strides.c;
    }
    if constexpr (PASS == Pass::kFprop) {
      apply_epilogue<T>(epilogue, acc[i], span);
      if (stats.moments) seen.add(acc[i]);
    }
    store_span(out, acc[i], span);
  }
  if (PASS == Pass::kFprop && stats.moments) {
    __syncthreads();  // all have read the last tiles before their memory serves the statistics
    static_assert(merge_scratch(kBlock / kPerThread, kBlock) <= 4 * kBlockK * kPitch);
    merge_block(seen, a_tiles, m_thread / kPerThread, kBlock / kPerThread, n_thread, kBlock,
                [&](int column, T count, T mean, T m2) {
      if (n0 + column < gemm.n) {
        stats.store(blockIdx.x / n_tiles, group * gemm.n + n0 + column, count, mean, m2);
      }
    });
  }
}

struct SimtPlan {
  int64_t tiles, splits, k_per_split;
};
SimtPlan plan_simt(Pass pass, const ConvProblem& p) {
  const GemmShape g = p.gemm_shape(pass);
  const int64_t tiles = ceil_div(g.m, kBlock) * ceil_div(g.n, kBlock);
  if (pass != Pass::kWgrad) return {tiles, 1, g.k};
  constexpr int64_t kLeastSteps = 16;  // of kBlockK pixels: fewer are not worth a slab
  const int64_t wanted = ceil_div(kTargetBlocks, tiles * p.groups), most = ceil_div(g.k, kLeastSteps * kBlockK);
  const int64_t per_split = ceil_div(ceil_div(g.k, wanted < most ? wanted : most), kBlockK) * kBlockK;
  return {tiles, ceil_div(g.k, per_split), per_split};
}

const char* reject(const ConvProblem& p) {
  if (p.npq() > INT32_MAX || p.nhw() > INT32_MAX) return "there are more than 2^31 pixels";
  if (p.groups > 65535) return "there are more than 65535 groups";
  if (int64_t{p.r} * p.s * max_of(p.c_per_group(), p.k_per_group()) > INT32_MAX) return "one filter is too large";
  for (const Pass pass : {Pass::kFprop, Pass::kDgrad, Pass::kWgrad}) {
    if (plan_simt(pass, p).tiles > INT32_MAX) return "the grid would exceed 2^31 blocks";
  }
  return nullptr;
}

template <class T>
int64_t wgrad_workspace(const ConvProblem& p, int32_t) {
  return plan_simt(Pass::kWgrad, p).splits * p.w_size() * static_cast<int64_t>(sizeof(T));
}

int64_t stats_rows(const ConvProblem& p) { return ceil_div(p.npq(), kBlock); }

template <class T, Pass PASS>
const char* launch(const ConvProblem& p, const LaunchArgs& args) {
  constexpr bool SPLITS = PASS == Pass::kWgrad;
  const SimtPlan plan = plan_simt(PASS, p);
  const dim3 grid(static_cast<unsigned>(plan.tiles), p.groups, static_cast<unsigned>(plan.splits));
  const char* error =
      launch_kernel(simt<T, PASS>, grid, dim3(kThreads), sizeof(T) * 4 * kBlockK * kPitch, args.stream,
                    Operands<T>(PASS, p, args), plan.k_per_split, static_cast<T*>(SPLITS ? args.workspace : args.out),
                    args.epilogue, PartialStats<T>(args.stats, stats_rows(p), p.k));
  if (error || !SPLITS) return error;
  return launch_reduce_splits<T>(args.workspace, args.out, p.w_size(), static_cast<int32_t>(plan.splits), args.stream);
}

double cost(const Variant& v, const ConvProblem& p) {
  return tiled_cost(v, p, v.arithmetic == Arithmetic::float64 ? kFp64Fma : kFp32Fma, 1);
}

template <class T, Pass PASS>
constexpr Variant variant_of(const char* name) {
  Variant v = cuda_variant<T>(name, Algorithm::direct, PASS, Layouts::kAny);
  v.reject = reject;
  v.workspace = PASS == Pass::kWgrad ? wgrad_workspace<T> : nullptr;
  v.pack_format = krsc_format;
  v.cost = cost;
  v.launch = launch<T, PASS>;
  v.gathers = true;
  v.stats_rows = PASS == Pass::kFprop ? stats_rows : nullptr;
  v.block_m = v.block_n = kBlock, v.block_k = kBlockK;
  return v;
}

}  // namespace
}  // namespace convext::cuda

namespace convext {
#define CONVEXT_SIMT(T, dtype)                                                  \
  extern const Variant fprop_simt_##dtype##_64x64x16_sm80 =                     \
      cuda::variant_of<T, Pass::kFprop>("fprop_simt_" #dtype "_64x64x16_sm80"); \
  extern const Variant dgrad_simt_##dtype##_64x64x16_sm80 =                     \
      cuda::variant_of<T, Pass::kDgrad>("dgrad_simt_" #dtype "_64x64x16_sm80"); \
  extern const Variant wgrad_simt_##dtype##_64x64x16_sm80 =                     \
      cuda::variant_of<T, Pass::kWgrad>("wgrad_simt_" #dtype "_64x64x16_sm80");
CONVEXT_SIMT(float, f32)
CONVEXT_SIMT(double, f64)
}  // namespace convext
