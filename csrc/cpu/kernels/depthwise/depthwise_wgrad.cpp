// Depthwise weight gradient.
//
//   dw[k, t, r, s] = sum_{n, z, p, q} dy[n, z, p, q, k] * x[n, z*stride - pad + t*dil, p*.. + r*.., q*.. + s*.., k / m]
//
// Tile: KR filter rows x S taps x W channels of dw in registers, walking along one row of dy in steps of 7 pixels:
//
//   dy   d0 d1 d2 d3 d4 d5 d6                     7 registers
//   x    x0 x1 x2 x3 x4 x5 x6 x7 x8               one at a time, used by every tap it meets: dw[s] += x[q + s] * d[q]
//   dw   row r:  [s0 s1 s2] ... KR rows           KR * S registers
//
// Registers of 32: 9 + 7 + 1 (3 x 3), 15 + 7 + 1 (5 x 5 in 3 + 2 filter rows), 14 + 7 + 1 (7 x 7 in 2 + 2 + 2 + 1);
// with 16 registers: 9 + 4 + 1, 10 + 4 + 1, 7 + 7 + 1. Loads per FMA: 34/63, 40/105, 33/98. Filter rows and columns
// that meet the padding are skipped.
//
// The rows of dy (N * Z * P) are cut into slabs by the shape alone. Each slab has its own sums, which stay in the caches
// while memory is walked row by row in its own order; at the end slabs are added up in their order. Threads share out
// slabs and blocks of channels: the result does not depend on them.
//
// Anything else (dilated columns, other filters, stride above 2, fewer channels than W, a channel multiplier) takes the
// general rows: up to 8 taps at a time, one load for each FMA.
//
// Chosen for every depthwise problem.
#include "cpu/simd/registers.h"
#include "depthwise.h"
#include "depthwise_input.h"

namespace convext::CONVEXT_ISA {
namespace {

constexpr int64_t kSlabPixels = 512, kMaxSlabs = 32;
constexpr int kGeneralTaps = 8;
constexpr double kSerialFlops = 2e5;       // below, threads cost more than they bring
constexpr double kStreamBytes = 16 << 20;  // dy and x together: more than a cache keeps for one operation

int64_t slabs_of(const ConvProblem& p) {
  const int64_t rows = int64_t{p.n} * p.z() * p.p(), wanted = rows * p.q() / kSlabPixels;
  const int64_t most = rows < kMaxSlabs ? rows : kMaxSlabs;
  return wanted < 1 ? 1 : wanted > most ? most : wanted;
}

template <class T>
int64_t slab_size(const ConvProblem& p) {
  return tap_blocks(p.k, Vec<T>::width) * Vec<T>::width * p.taps();
}

template <class T>
int64_t workspace(const ConvProblem& p, int32_t) {
  return slabs_of(p) * slab_size<T>(p) * int64_t{sizeof(T)};
}

// One row of dy against the input rows that its filter rows meet in one plane, one block of channels.
template <class T>
struct Row {
  const T *dy, *x;  // row p of dy; a plane of image n; both at the block's first channel
  T* dw;            // the block's sums of a plane of the filter, [r][s][W]
  int64_t dy_column, x_column, x_row;
  int32_t h;  // input row of filter row 0; may be outside
  const ConvProblem* problem;
  int64_t k;     // the block's first filter
  bool streams;  // dy and x come from memory, not from a cache
};

// ---- small filters: S taps one column apart, KR filter rows at a time ----

// COUNT pixels of dy, against all taps in registers.
template <int S, int STEP, int KR, int COUNT, bool EDGE, class T>
CONVEXT_INLINE void add_pixels(const T* dy, int64_t dy_column, const T* const (&x)[KR], int64_t x_column,
                               int32_t column, int32_t columns, Vec<T> (&sums)[KR][S]) {
  Vec<T> d[COUNT];
  CONVEXT_UNROLL
  for (int q = 0; q < COUNT; ++q) d[q] = load(dy + q * dy_column);
  CONVEXT_UNROLL
  for (int r = 0; r < KR; ++r) {
    if (!x[r]) continue;
    CONVEXT_UNROLL
    for (int i = 0; i < (COUNT - 1) * STEP + S; ++i) {
      if (EDGE && static_cast<uint32_t>(column + i) >= static_cast<uint32_t>(columns)) continue;
      const Vec<T> v = load(x[r] + (column + i) * x_column);
      CONVEXT_UNROLL
      for (int s = 0; s < S; ++s) {
        if (i < s || (i - s) % STEP != 0 || (i - s) / STEP >= COUNT) continue;
        sums[r][s] = fma(sums[r][s], v, d[(i - s) / STEP]);
      }
    }
  }
}

// Asks for what the next row of dy will be the first to read: that row, and the input rows below this row's window.
template <int STEP, int COUNT, class T>
CONVEXT_INLINE void prefetch_below(const Row<T>& row, int32_t q, int32_t column) {
  const ConvProblem& p = *row.problem;
  const T* const dy = row.dy + (int64_t{p.q()} + q) * row.dy_column;
  CONVEXT_UNROLL
  for (int j = 0; j < COUNT; ++j) __builtin_prefetch(dy + j * row.dy_column);
  const int32_t next = row.h + (p.r - 1) * p.dil_h + 1;
  for (int32_t h = next; h < next + p.stride_h && h < p.h; ++h) {
    const T* const x = row.x + h * row.x_row + column * row.x_column;
    CONVEXT_UNROLL
    for (int j = 0; j < COUNT * STEP; ++j) __builtin_prefetch(x + j * row.x_column);
  }
}

template <class T, int S, int STEP, int KR, int COUNT>
void small_row(const Row<T>& row) {
  constexpr int64_t width = Vec<T>::width;
  const ConvProblem& p = *row.problem;
  const int32_t dil_h = p.dil_h, h_size = p.h, w_size = p.w, pad_w = p.pad_w, q_count = p.q(), r_count = p.r;
  for (int32_t r0 = 0; r0 < r_count; r0 += KR) {
    const T* x[KR];
    bool any = false;
    CONVEXT_UNROLL
    for (int r = 0; r < KR; ++r) {
      const int32_t h = row.h + (r0 + r) * dil_h;
      const bool meets = r0 + r < r_count && static_cast<uint32_t>(h) < static_cast<uint32_t>(h_size);
      x[r] = meets ? row.x + h * row.x_row : nullptr;
      any |= meets;
    }
    if (!any) continue;
    T* const dw = row.dw + r0 * S * width;
    Vec<T> sums[KR][S];
    unrolled<KR, S>([&](int r, int s)
                        CONVEXT_LAMBDA_INLINE { sums[r][s] = x[r] ? load(dw + (r * S + s) * width) : Vec<T>::zero(); });
    int32_t q = 0;
    for (; q + COUNT <= q_count; q += COUNT) {
      const int32_t column = q * STEP - pad_w;
      const T* const dy = row.dy + q * row.dy_column;
      if (row.streams && r0 == 0) prefetch_below<STEP, COUNT>(row, q, column);
      if (column >= 0 && column + (COUNT - 1) * STEP + S <= w_size) {
        add_pixels<S, STEP, KR, COUNT, false>(dy, row.dy_column, x, row.x_column, column, w_size, sums);
      } else {
        add_pixels<S, STEP, KR, COUNT, true>(dy, row.dy_column, x, row.x_column, column, w_size, sums);
      }
    }
    for (; q < q_count; ++q) {
      add_pixels<S, STEP, KR, 1, true>(row.dy + q * row.dy_column, row.dy_column, x, row.x_column, q * STEP - pad_w,
                                       w_size, sums);
    }
    unrolled<KR, S>([&](int r, int s) CONVEXT_LAMBDA_INLINE {
      if (x[r]) store(dw + (r * S + s) * width, sums[r][s]);
    });
  }
}

// ---- any filter ----

template <class T, class Input>
void general_row(const Row<T>& row) {
  constexpr int64_t width = Vec<T>::width;
  const ConvProblem& p = *row.problem;
  const int32_t q_count = p.q();
  const Input input(row.k, p.k, p.k / p.c);
  for (int32_t r = 0; r < p.r; ++r) {
    const int32_t h = row.h + r * p.dil_h;
    if (h < 0 || h >= p.h) continue;
    const T* const x = row.x + h * row.x_row;
    for (int32_t s0 = 0; s0 < p.s; s0 += kGeneralTaps) {
      const int32_t taps = p.s - s0 < kGeneralTaps ? p.s - s0 : kGeneralTaps;
      T* const dw = row.dw + (int64_t{r} * p.s + s0) * width;
      Vec<T> sums[kGeneralTaps];
      CONVEXT_UNROLL
      for (int s = 0; s < kGeneralTaps; ++s) sums[s] = s < taps ? load(dw + s * width) : Vec<T>::zero();
      for (int32_t q = 0; q < q_count; ++q) {
        Vec<T> d;
        if constexpr (Input::kWhole) {
          d = load(row.dy + q * row.dy_column);
        } else {
          d = load(row.dy + q * row.dy_column, input.lanes);
        }
        CONVEXT_UNROLL
        for (int s = 0; s < kGeneralTaps; ++s) {
          const int32_t column = p.w_of(q, s0 + s);
          if (s >= taps || static_cast<uint32_t>(column) >= static_cast<uint32_t>(p.w)) continue;
          sums[s] = fma(sums[s], d, input(x + column * row.x_column));
        }
      }
      CONVEXT_UNROLL
      for (int s = 0; s < kGeneralTaps; ++s) {
        if (s < taps) store(dw + s * width, sums[s]);
      }
    }
  }
}

// ---- the choice, the slabs ----

template <class T>
using RowFunction = void (*)(const Row<T>&);

template <class T>
RowFunction<T> row_function(const ConvProblem& p) {
  constexpr bool many = kVectorRegisters >= 32;
  if (p.k != p.c) return general_row<T, SpreadInput<T>>;
  if (p.k < Vec<T>::width) return general_row<T, PartInput<T>>;
  if (p.dil_w == 1 && p.stride_w == 1) {
    if (p.s == 3) return small_row<T, 3, 1, 3, (many ? 7 : 4)>;
    if (p.s == 5) return small_row<T, 5, 1, (many ? 3 : 2), (many ? 7 : 4)>;
    if (p.s == 7) return small_row<T, 7, 1, (many ? 2 : 1), 7>;
  }
  if (p.dil_w == 1 && p.stride_w == 2) {
    if (p.s == 3) return small_row<T, 3, 2, 3, (many ? 7 : 4)>;
    if (p.s == 5) return small_row<T, 5, 2, (many ? 3 : 2), (many ? 7 : 4)>;
    if (p.s == 7) return small_row<T, 7, 2, (many ? 2 : 1), 7>;
  }
  return general_row<T, WholeInput<T>>;
}

template <class T>
const char* launch(const ConvProblem& problem, const LaunchArgs& args) {
  constexpr int64_t width = Vec<T>::width;
  const ConvProblem& p = problem;
  const Parallel parallel{args.parallel->run, p.flops() < kSerialFlops ? 1 : args.parallel->threads};
  const T *const dy = static_cast<const T*>(args.a), *const x = static_cast<const T*>(args.b);
  T *const dw = static_cast<T*>(args.out), *const partial = static_cast<T*>(args.workspace);
  const int64_t slabs = slabs_of(p), blocks = tap_blocks(p.k, width), taps = p.taps();
  const int64_t rows = int64_t{p.n} * p.z() * p.p(), size = slab_size<T>(p), plane_taps = int64_t{p.r} * p.s;
  const RowFunction<T> add_row = row_function<T>(p);
  const bool streams = double(p.x_size() + p.y_size()) * sizeof(T) > kStreamBytes;

  int64_t splits = parallel.threads <= 1 ? 1 : (4 * parallel.threads + slabs - 1) / slabs;
  if (splits > blocks) splits = blocks;
  parallel.for_each(slabs * splits, [&](int64_t task) {
    const int64_t slab = task / splits, split = task % splits;
    const int64_t first = split * blocks / splits, last = (split + 1) * blocks / splits;
    T* const sums = partial + slab * size;
    for (int64_t i = first * taps * width; i < last * taps * width; ++i) sums[i] = T(0);
    for (int64_t row = slab * rows / slabs; row < (slab + 1) * rows / slabs; ++row) {
      const int64_t n = row / p.p() / p.z();
      const int32_t z = static_cast<int32_t>(row / p.p() % p.z());
      Row<T> r{};
      r.dy_column = p.k;
      r.x_column = p.c;
      r.x_row = int64_t{p.w} * p.c;
      r.h = p.h_of(static_cast<int32_t>(row % p.p()), 0);
      r.problem = &p;
      r.streams = streams;
      for (int64_t block = first; block < last; ++block) {
        r.k = tap_block_begin(block, p.k, width);
        r.dy = dy + row * p.q() * p.k + r.k;
        for (int32_t t = 0; t < p.t; ++t) {
          const int32_t d = p.d_of(z, t);
          if (d < 0 || d >= p.d) continue;
          r.x = x + (n * p.d + d) * p.h * r.x_row + r.k;
          r.dw = sums + (block * taps + t * plane_taps) * width;
          add_row(r);
        }
      }
    }
  });

  parallel.for_each(blocks, [&](int64_t block) {
    const int64_t begin = tap_block_begin(block, p.k, width), seen = block * width - begin;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const T* const from = partial + (block * taps + tap) * width;
      Vec<T> sum = load(from);
      for (int64_t slab = 1; slab < slabs; ++slab) sum += load(from + slab * size);
      for (int64_t lane = seen; lane < width && begin + lane < p.k; ++lane) {
        dw[(begin + lane) * taps + tap] = sum.v[lane];
      }
    }
  });
  return nullptr;
}

}  // namespace
}  // namespace convext::CONVEXT_ISA

CONVEXT_DEFINE_VARIANTS(wgrad_depthwise,
                        of_volumes(cpu_variant<T>(name, Algorithm::depthwise, Pass::kWgrad, reject_unless_depthwise,
                                                  launch<T>, depthwise_work, workspace<T>)))
