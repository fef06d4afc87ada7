#include "gemm.h"

namespace convext::CONVEXT_ISA {
namespace {

// Activations that are a clamp (identity, relu, relu6) are applied to the accumulators in registers; the others to the
// tile that has just been written, while it is in the first-level cache, by one loop instead of rows * vectors copies.
template <class T>
struct Clamp {
  T low, high;
  bool exact;  // the clamp is the whole activation

  explicit Clamp(Activation which)
      : low(-static_cast<T>(__builtin_inf())), high(static_cast<T>(__builtin_inf())), exact(true) {
    if (which == Activation::relu || which == Activation::relu6) low = 0;
    if (which == Activation::relu6) high = 6;
    exact = which == Activation::identity || which == Activation::relu || which == Activation::relu6;
  }
};

template <class T>
__attribute__((noinline)) void activate(Activation which, T* const* out, int64_t offset, int32_t rows,
                                        int32_t columns) {
  visit_activation<Vec<T>>(which, [=](auto f) {
    for (int32_t i = 0; i < rows; ++i) {
      for (int32_t j = 0; j < columns; j += Vec<T>::width) {
        const Lanes<T> lanes(columns - j);
        T* p = out[i] + offset + j;
        store(p, f.forward(load(p, lanes)), lanes);
      }
    }
  });
}

template <class T, int ROWS, int VECTORS>
void tile(const TileArgs<T>& args) {
  using V = Vec<T>;
  constexpr int kWidth = V::width;
  const Lanes<T> tail(args.columns - (VECTORS - 1) * kWidth);
  // A tile is at least VECTORS - 1 whole vectors and one lane wide: only the last vector is masked.
  const bool whole = args.columns == VECTORS * kWidth;
  const auto load_columns = [&](const T* p, int j) { return j == VECTORS - 1 && !whole ? load(p, tail) : load(p); };

  V acc[ROWS][VECTORS];  // ROWS * VECTORS registers
  CONVEXT_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    CONVEXT_UNROLL
    for (int j = 0; j < VECTORS; ++j) acc[i][j] = V::zero();
  }

  for (int32_t n = 0; n < args.num_taps; ++n) {
    const int32_t t = args.taps[n];
    const T* const* rows = args.rows + t * args.rows_pitch;
    const T* b = args.b + args.b_taps[t] * args.b_tap_pitch;
    const T* a[ROWS];
    CONVEXT_UNROLL
    for (int i = 0; i < ROWS; ++i) a[i] = rows[i] + args.a_offset;
    for (int64_t l = 0; l < args.depth; ++l, b += VECTORS * kWidth) {
      V column[VECTORS];
      CONVEXT_UNROLL
      for (int j = 0; j < VECTORS; ++j) column[j] = load(b + j * kWidth);
      CONVEXT_UNROLL
      for (int i = 0; i < ROWS; ++i) {
        const V broadcast(a[i][l]);
        CONVEXT_UNROLL
        for (int j = 0; j < VECTORS; ++j) acc[i][j] = fma(acc[i][j], broadcast, column[j]);
      }
    }
  }

  if (args.accumulate) {
    CONVEXT_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      const T* p = args.out[i] + args.out_offset;
      CONVEXT_UNROLL
      for (int j = 0; j < VECTORS; ++j) acc[i][j] += load_columns(p + j * kWidth, j);
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
  const Clamp<T> clamp(args.finish ? args.activation : Activation::identity);
  const V low(clamp.low), high(clamp.high);
  CONVEXT_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    T* p = args.out[i] + args.out_offset;
    CONVEXT_UNROLL
    for (int j = 0; j < VECTORS; ++j) {
      const V value = min_keep_nan(max_keep_nan(acc[i][j], low), high);
      if (j == VECTORS - 1 && !whole) {
        store(p + j * kWidth, value, tail);
      } else {
        store(p + j * kWidth, value);
      }
    }
  }
  if (!clamp.exact) activate(args.activation, args.out, args.out_offset, ROWS, args.columns);
}

// kernels[vectors - 1][rows - 1], filled at compile time.
template <class T>
struct Table {
  TileKernel<T> kernels[kMaxVectors][kMaxRows];

  template <int VECTORS, int ROWS>
  constexpr void fill_rows() {
    if constexpr (ROWS <= max_rows(VECTORS)) {
      kernels[VECTORS - 1][ROWS - 1] = tile<T, ROWS, VECTORS>;
      fill_rows<VECTORS, ROWS + 1>();
    }
  }
  template <int VECTORS>
  constexpr void fill() {
    fill_rows<VECTORS, 1>();
    if constexpr (VECTORS < kMaxVectors) fill<VECTORS + 1>();
  }
  constexpr Table() : kernels{} { fill<1>(); }
};

}  // namespace

template <class T>
TileKernel<T> tile_kernel(int rows, int vectors) {
  static constexpr Table<T> table;
  return table.kernels[vectors - 1][rows - 1];
}

template TileKernel<float> tile_kernel<float>(int, int);
template TileKernel<double> tile_kernel<double>(int, int);

}  // namespace convext::CONVEXT_ISA
