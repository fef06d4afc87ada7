// Compiled for AVX512-BF16, too.
#include "gemm.h"

#include "cpu/simd/registers.h"
#include "tile_epilogue.h"

namespace convext::CONVEXT_ISA {
namespace {

// One multiplication of the inner loop: kDepthStep<T> steps of the reduction, a row of A by a vector of columns of B.
template <class T>
struct Multiply {
  using Operand = Vec<T>;
  static CONVEXT_INLINE Operand broadcast(const T* a) { return Operand(*a); }
  static CONVEXT_INLINE Operand columns(const T* b) { return load(b); }
  CONVEXT_INLINE Vec<T> operator()(Vec<T> acc, Operand a, Operand b) const { return fma(acc, a, b); }
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
  CONVEXT_INLINE Vec<float> operator()(Vec<float> acc, Operand a, Operand b) const {
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

// The sums of a tile, all in registers.
template <class T, int ROWS, int VECTORS>
using Sums = VecOf<T>[ROWS][VECTORS];

// The main loop: what the tile's taps add, step by step of their depth.
template <class T, int ROWS, int VECTORS>
CONVEXT_INLINE void multiply(const TileArgs<T>& args, Sums<T, ROWS, VECTORS>& sums) {
  using Step = Multiply<T>;
  constexpr int kStep = kDepthStep<T>, kVector = VecOf<T>::width * kStep;
  [[maybe_unused]] auto* ahead = reinterpret_cast<const char*>(args.ahead);
  for (int32_t n = 0; n < args.num_taps; ++n) {
    const int32_t t = args.taps[n];
    const T* const* rows = args.rows + t * args.rows_pitch;
    const T* b = args.b + args.b_taps[t] * args.b_tap_pitch;
    const T* a[ROWS];
    CONVEXT_UNROLL
    for (int i = 0; i < ROWS; ++i) a[i] = rows[i] + args.a_offset;
    const auto step = [&](auto&& broadcast) CONVEXT_LAMBDA_INLINE {
      add_outer(sums, broadcast, [&](int j) CONVEXT_LAMBDA_INLINE { return Step::columns(b + j * kVector); }, Step{});
      b += VECTORS * kVector;
      if constexpr (VECTORS >= kPrefetchingVectors) __builtin_prefetch(ahead, 0, 2), ahead += kCacheLine;
    };
    for (int64_t l = 0; l + kStep <= args.depth; l += kStep) {
      step([&](int i) CONVEXT_LAMBDA_INLINE { return Step::broadcast(a[i] + l); });
    }
    if constexpr (kStep == 2) {
      const int64_t last = args.depth - 1;
      if (last % 2 == 0) step([&](int i) CONVEXT_LAMBDA_INLINE { return Step::broadcast_last(a[i] + last); });
    }
  }
}

// Adds the sums of the parts of the reduction that came before.
template <class T, int ROWS, int VECTORS>
CONVEXT_INLINE void add_partial(const TileArgs<T>& args, TileColumns<T, VECTORS> columns,
                                Sums<T, ROWS, VECTORS>& sums) {
  unrolled<ROWS, VECTORS>([&](int i, int j) CONVEXT_LAMBDA_INLINE {
    if constexpr (kPartialInOutput<T>) {
      sums[i][j] += columns.load(args.out[i] + args.out_offset, j);
    } else {
      sums[i][j] += load(args.partial + (i * VECTORS + j) * VecOf<T>::width);
    }
  });
}

// The epilogue up to the activation.
template <class T, int ROWS, int VECTORS>
CONVEXT_INLINE void scale_shift_add(const TileArgs<T>& args, TileColumns<T, VECTORS> columns,
                                    Sums<T, ROWS, VECTORS>& sums) {
  if (args.scale) {
    unrolled<VECTORS, ROWS>([&](int j, int i)
                                CONVEXT_LAMBDA_INLINE { sums[i][j] = sums[i][j] * columns.load(args.scale, j); });
  }
  if (args.shift) {
    unrolled<VECTORS, ROWS>([&](int j, int i) CONVEXT_LAMBDA_INLINE { sums[i][j] += columns.load(args.shift, j); });
  }
  if (args.residual) {
    unrolled<ROWS, VECTORS>([&](int i, int j) CONVEXT_LAMBDA_INLINE {
      sums[i][j] += columns.load(args.residual + (args.out[i] - args.out_base) + args.out_offset, j);
    });
  }
}

// The clamped sums to memory, in the type of the output.
template <class T, int ROWS, int VECTORS>
CONVEXT_INLINE void write(const TileArgs<T>& args, TileColumns<T, VECTORS> columns, Clamp<compute_t<T>> clamp,
                          const Sums<T, ROWS, VECTORS>& sums) {
  constexpr int kWidth = VecOf<T>::width;
  const auto clamped = clamp.of_vectors();
  CONVEXT_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    T* const p = args.out[i] + args.out_offset;
    // Two vectors of bfloat16 make one; the last two only where no lane is missing.
    constexpr int kPaired = kDepthStep<T> == 2 ? (VECTORS - 1) / 2 * 2 : 0;
    if constexpr (kDepthStep<T> == 2) {
      CONVEXT_UNROLL
      for (int j = 0; j < kPaired; j += 2) store_pair(p + j * kWidth, clamped(sums[i][j]), clamped(sums[i][j + 1]));
      if (VECTORS % 2 == 0 && columns.whole) {
        store_pair(p + kPaired * kWidth, clamped(sums[i][kPaired]), clamped(sums[i][VECTORS - 1]));
        continue;
      }
    }
    CONVEXT_UNROLL
    for (int j = kPaired; j < VECTORS; ++j) columns.store(p, j, clamped(sums[i][j]));
  }
}

template <class T, int ROWS, int VECTORS>
void tile(const TileArgs<T>& args) {
  using V = VecOf<T>;
  const TileColumns<T, VECTORS> columns(args.columns);
  Sums<T, ROWS, VECTORS> sums;
  unrolled<ROWS, VECTORS>([&](int i, int j) CONVEXT_LAMBDA_INLINE { sums[i][j] = V::zero(); });
  if (args.finish && args.residual) prefetch_ends<T, ROWS, VECTORS>(args);
  multiply<T, ROWS, VECTORS>(args, sums);
  if (args.accumulate) add_partial<T, ROWS, VECTORS>(args, columns, sums);
  if (args.finish) scale_shift_add<T, ROWS, VECTORS>(args, columns, sums);
  const Clamp<compute_t<T>> clamp(args.finish ? args.activation : Activation::identity);
  if (kPartialInOutput<T> || (args.finish && clamp.exact)) {
    write<T, ROWS, VECTORS>(args, columns, clamp, sums);
  } else {
    unrolled<ROWS, VECTORS>(
        [&](int i, int j) CONVEXT_LAMBDA_INLINE { store(args.partial + (i * VECTORS + j) * V::width, sums[i][j]); });
  }
  if (!clamp.exact) activate(args, ROWS, VECTORS * V::width);
}

}  // namespace

template <class T>
TileKernel<T> tile_kernel(int rows, int vectors) {
  static constexpr TileTable<TileKernel<T>> table([](auto r, auto v) { return tile<T, r.value, v.value>; });
  return table.of(rows, vectors);
}

#define CONVEXT_INSTANTIATE(T, name) template TileKernel<T> tile_kernel<T>(int, int);
CONVEXT_FOR_ELEMENTS(CONVEXT_INSTANTIATE)
#undef CONVEXT_INSTANTIATE

}  // namespace convext::CONVEXT_ISA
