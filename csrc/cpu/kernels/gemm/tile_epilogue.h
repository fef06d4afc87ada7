// The last steps of a register tile: what the activations that are a clamp do to accumulators, and the others to a tile
// that has just been written and is still in the first-level cache.
#pragma once
#include "cpu/simd/vec.h"

namespace convext::CONVEXT_ISA {

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
