// Compiled for AVX512-BF16, too.
#include "gemm.h"

#include "tile_epilogue.h"

namespace convext::CONVEXT_ISA {
namespace {

// One multiplication of the inner loop: kDepthStep<T> steps of the reduction, a row of A by a vector of columns of B.
template <class T>
struct Multiply {
  using Operand = Vec<T>;
  static CONVEXT_INLINE Operand broadcast(const T* a) { return Operand(*a); }
  static CONVEXT_INLINE Operand columns(const T* b) { return load(b); }
  static CONVEXT_INLINE Vec<T> add(Vec<T> acc, Operand a, Operand b) { return fma(acc, a, b); }
};

#if defined(__AVX512BF16__)
// Products are exact in float; the instruction rounds sums to the nearest, takes subnormal operands and results for
// zero, and does not ask the floating-point environment.
template <>
struct Multiply<BFloat16> {
  using Operand = __m512i;
  static CONVEXT_INLINE Operand broadcast(const BFloat16* a) {
    int32_t pair;
    __builtin_memcpy(&pair, a, sizeof pair);
    return _mm512_set1_epi32(pair);
  }
  // The one that is left of an odd depth: its neighbour may be another pixel's, or nobody's.
  static CONVEXT_INLINE Operand broadcast_last(const BFloat16* a) { return _mm512_set1_epi32(a->bits); }
  static CONVEXT_INLINE Operand columns(const BFloat16* b) { return _mm512_loadu_si512(b); }
  static CONVEXT_INLINE Vec<float> add(Vec<float> acc, Operand a, Operand b) {
    return static_cast<Native<float>::type>(_mm512_dpbf16_ps(acc.v, (__m512bh)b, (__m512bh)a));
  }
};
#endif

// Activations that are not a clamp (tile_epilogue.h) are applied to the tile that has just been written, while it is in
// the first-level cache, by one loop instead of rows * vectors copies.
template <class T>
__attribute__((noinline)) void activate(const TileArgs<T>& args, int32_t rows, int32_t lanes_a_row) {
  using V = VecOf<T>;
  const int32_t columns = args.columns, whole = columns / V::width * V::width;
  const Lanes<compute_t<T>> tail(columns - whole);
  visit_activation<V>(args.activation, [&](auto f) {
    for (int32_t i = 0; i < rows; ++i) {
      T* const out = args.out[i] + args.out_offset;
      const auto apply = [&](int32_t j, auto... lanes) __attribute__((always_inline)) {
        if constexpr (kPartialInOutput<T>) {
          store(out + j, f.forward(load(out + j, lanes...)), lanes...);
        } else {
          store_as(out + j, f.forward(load(args.partial + i * lanes_a_row + j)), lanes...);
        }
      };
      for (int32_t j = 0; j < whole; j += V::width) apply(j);
      if (whole < columns) apply(whole, tail);
    }
  });
}

// Asks for the residual and the outputs of a tile before its sums are there. A layer that has a residual is mostly one
// of many channels, whose tiles touch short runs far apart, which the hardware does not follow.
template <class T, int ROWS, int VECTORS>
CONVEXT_INLINE void prefetch_ends(const TileArgs<T>& args) {
  constexpr int kLanes = VECTORS * VecOf<T>::width, kLine = kCacheLine / sizeof(T);
  CONVEXT_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    T* const to = args.out[i] + args.out_offset;
    const T* const from = args.residual + (to - args.out_base);
    CONVEXT_UNROLL
    for (int j = 0; j < kLanes; j += kLine) {
      __builtin_prefetch(from + j);
      __builtin_prefetch(to + j, 1);
    }
  }
}

template <class T, int ROWS, int VECTORS>
void tile(const TileArgs<T>& args) {
  using V = VecOf<T>;
  using C = compute_t<T>;
  using Step = Multiply<T>;
  constexpr int kWidth = V::width, kStep = kDepthStep<T>;
  const Lanes<C> tail(args.columns - (VECTORS - 1) * kWidth);
  // A tile is at least VECTORS - 1 whole vectors and one lane wide: only the last vector is masked.
  const bool whole = args.columns == VECTORS * kWidth;
  const auto load_columns = [&](const auto* p, int j) {
    return j == VECTORS - 1 && !whole ? load_as(p, tail) : load_as(p);
  };

  V acc[ROWS][VECTORS];  // ROWS * VECTORS registers
  CONVEXT_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    CONVEXT_UNROLL
    for (int j = 0; j < VECTORS; ++j) acc[i][j] = V::zero();
  }

  if (args.finish && args.residual) prefetch_ends<T, ROWS, VECTORS>(args);
  [[maybe_unused]] auto* ahead = reinterpret_cast<const char*>(args.ahead);
  for (int32_t n = 0; n < args.num_taps; ++n) {
    const int32_t t = args.taps[n];
    const T* const* rows = args.rows + t * args.rows_pitch;
    const T* b = args.b + args.b_taps[t] * args.b_tap_pitch;
    const T* a[ROWS];
    CONVEXT_UNROLL
    for (int i = 0; i < ROWS; ++i) a[i] = rows[i] + args.a_offset;
    const auto step = [&](auto&& broadcast) __attribute__((always_inline)) {
      typename Step::Operand column[VECTORS];
      CONVEXT_UNROLL
      for (int j = 0; j < VECTORS; ++j) column[j] = Step::columns(b + j * kWidth * kStep);
      CONVEXT_UNROLL
      for (int i = 0; i < ROWS; ++i) {
        const typename Step::Operand row = broadcast(i);
        CONVEXT_UNROLL
        for (int j = 0; j < VECTORS; ++j) acc[i][j] = Step::add(acc[i][j], row, column[j]);
      }
      b += VECTORS * kWidth * kStep;
      if constexpr (VECTORS >= kPrefetchingVectors) __builtin_prefetch(ahead, 0, 2), ahead += kCacheLine;
    };
    for (int64_t l = 0; l + kStep <= args.depth; l += kStep) {
      step([&](int i) __attribute__((always_inline)) { return Step::broadcast(a[i] + l); });
    }
    if constexpr (kStep == 2) {
      const int64_t last = args.depth - 1;
      if (last % 2 == 0) step([&](int i) __attribute__((always_inline)) { return Step::broadcast_last(a[i] + last); });
    }
  }

  if (args.accumulate) {
    CONVEXT_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      CONVEXT_UNROLL
      for (int j = 0; j < VECTORS; ++j) {
        if constexpr (kPartialInOutput<T>) {
          acc[i][j] += load_columns(args.out[i] + args.out_offset + j * kWidth, j);
        } else {
          acc[i][j] += load(args.partial + (i * VECTORS + j) * kWidth);
        }
      }
    }
  }
  if (args.finish) {
    if (args.scale) {
      CONVEXT_UNROLL
      for (int j = 0; j < VECTORS; ++j) {
        const V scale = load_columns(args.scale + j * kWidth, j);
        CONVEXT_UNROLL
        for (int i = 0; i < ROWS; ++i) acc[i][j] = acc[i][j] * scale;
      }
    }
    if (args.shift) {
      CONVEXT_UNROLL
      for (int j = 0; j < VECTORS; ++j) {
        const V shift = load_columns(args.shift + j * kWidth, j);
        CONVEXT_UNROLL
        for (int i = 0; i < ROWS; ++i) acc[i][j] += shift;
      }
    }
    if (args.residual) {
      CONVEXT_UNROLL
      for (int i = 0; i < ROWS; ++i) {
        const T* p = args.residual + (args.out[i] - args.out_base) + args.out_offset;
        CONVEXT_UNROLL
        for (int j = 0; j < VECTORS; ++j) acc[i][j] += load_columns(p + j * kWidth, j);
      }
    }
  }
  const Clamp<C> clamp(args.finish ? args.activation : Activation::identity);
  if (!kPartialInOutput<T> && !(args.finish && clamp.exact)) {
    CONVEXT_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      CONVEXT_UNROLL
      for (int j = 0; j < VECTORS; ++j) store(args.partial + (i * VECTORS + j) * kWidth, acc[i][j]);
    }
    if (args.finish) activate(args, ROWS, VECTORS * kWidth);
    return;
  }
  const V low(clamp.low), high(clamp.high);
  CONVEXT_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    T* p = args.out[i] + args.out_offset;
    const auto value = [&](int j)
                           __attribute__((always_inline)) { return min_keep_nan(max_keep_nan(acc[i][j], low), high); };
    // Two vectors of bfloat16 make one; the last two only where no lane is missing.
    constexpr int kPaired = kStep == 2 ? (VECTORS - 1) / 2 * 2 : 0;
    if constexpr (kStep == 2) {
      CONVEXT_UNROLL
      for (int j = 0; j < kPaired; j += 2) store_pair(p + j * kWidth, value(j), value(j + 1));
      if (VECTORS % 2 == 0 && whole) {
        store_pair(p + kPaired * kWidth, value(kPaired), value(VECTORS - 1));
        continue;
      }
    }
    CONVEXT_UNROLL
    for (int j = kPaired; j < VECTORS; ++j) {
      if (j == VECTORS - 1 && !whole) {
        store_as(p + j * kWidth, value(j), tail);
      } else {
        store_as(p + j * kWidth, value(j));
      }
    }
  }
  if (!clamp.exact) activate(args, ROWS, VECTORS * kWidth);
}

}  // namespace

template <class T>
TileKernel<T> tile_kernel(int rows, int vectors) {
  static constexpr TileTable<TileKernel<T>> table(
      [](auto r, auto v) -> TileKernel<T> { return tile<T, decltype(r)::value, decltype(v)::value>; });
  return table.of(rows, vectors);
}

#define CONVEXT_INSTANTIATE(T, name) template TileKernel<T> tile_kernel<T>(int, int);
CONVEXT_FOR_ELEMENTS(CONVEXT_INSTANTIATE)
#undef CONVEXT_INSTANTIATE

}  // namespace convext::CONVEXT_ISA
