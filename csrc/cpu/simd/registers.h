// Blocks of vectors that stay in registers, where every loop over them is written out by the compiler, and what becomes
// of them on their way to memory.
#pragma once
#include "vec.h"

namespace convext::CONVEXT_ISA {

// Calls f(i, j) for 0 <= i < ROWS, 0 <= j < COLUMNS, row by row.
template <int ROWS, int COLUMNS, class F>
CONVEXT_INLINE void unrolled(F&& f) {
  CONVEXT_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    CONVEXT_UNROLL
    for (int j = 0; j < COLUMNS; ++j) f(i, j);
  }
}

struct FusedMultiplyAdd {
  template <class V>
  CONVEXT_INLINE V operator()(V acc, V a, V b) const {
    return fma(acc, a, b);
  }
};

// One step of a matrix product: acc[i][j] = add(acc[i][j], row(i), column(j)). Columns are loaded first, all of them.
template <int ROWS, int VECTORS, class V, class Row, class Column, class Add = FusedMultiplyAdd>
CONVEXT_INLINE void add_outer(V (&acc)[ROWS][VECTORS], Row&& row, Column&& column, Add add = {}) {
  decltype(column(0)) loaded[VECTORS];
  CONVEXT_UNROLL
  for (int j = 0; j < VECTORS; ++j) loaded[j] = column(j);
  CONVEXT_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    const auto broadcast = row(i);
    CONVEXT_UNROLL
    for (int j = 0; j < VECTORS; ++j) acc[i][j] = add(acc[i][j], broadcast, loaded[j]);
  }
}

// identity, relu and relu6 as low <= z <= high.
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
  // clamp(z), as a function of vectors.
  CONVEXT_INLINE auto of_vectors() const {
    return [low = Vec<T>(low), high = Vec<T>(high)](Vec<T> z)
               CONVEXT_LAMBDA_INLINE { return min_keep_nan(max_keep_nan(z, low), high); };
  }
};

}  // namespace convext::CONVEXT_ISA
