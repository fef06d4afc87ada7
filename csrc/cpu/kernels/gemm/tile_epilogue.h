// The last steps of a register tile: where its columns lie, and what activations that are no clamp do to a tile that has
// just been written and is still in the first-level cache.
#pragma once
#include "cpu/simd/half.h"
#include "cpu/simd/registers.h"

namespace convext::CONVEXT_ISA {

// The columns of a tile, at least VECTORS - 1 whole vectors and one lane: only the last vector is masked.
template <class T, int VECTORS>
struct TileColumns {
  using V = VecOf<T>;
  const Lanes<compute_t<T>> tail;
  const bool whole;

  explicit CONVEXT_INLINE TileColumns(int32_t columns)
      : tail(columns - (VECTORS - 1) * V::width), whole(columns == VECTORS * V::width) {}

  // Vector j of what column 0 of is at p: elements of T, or what they are computed in.
  template <class S>
  CONVEXT_INLINE V load(const S* p, int j) const {
    return j == VECTORS - 1 && !whole ? load_as(p + j * V::width, tail) : load_as(p + j * V::width);
  }
  CONVEXT_INLINE void store(T* p, int j, V value) const {
    j == VECTORS - 1 && !whole ? store_as(p + j * V::width, value, tail) : store_as(p + j * V::width, value);
  }
};

// Any activation over rows of `columns` elements, `pitch` apart: one loop instead of a copy for every tile.
template <class T>
__attribute__((noinline)) void activate(Activation which, T* out, int64_t pitch, int32_t rows, int32_t columns) {
  visit_activation<Vec<T>>(which, [=](auto f) {
    for (int32_t i = 0; i < rows; ++i) {
      for (int32_t j = 0; j < columns; j += Vec<T>::width) {
        const Lanes<T> lanes(columns - j);
        T* p = out + i * pitch + j;
        store(p, f.forward(load(p, lanes)), lanes);
      }
    }
  });
}

}  // namespace convext::CONVEXT_ISA
