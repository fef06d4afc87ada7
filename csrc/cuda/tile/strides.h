#pragma once
#include "cuda/compat.h"

namespace convext::cuda {

// Element strides of an activation tensor in either memory order.
struct Strides {
  int64_t n, c, h, w;
};
inline Strides strides_of(Layout layout, int64_t c, int64_t h, int64_t w) {
  if (layout == Layout::kNHWC) return {h * w * c, 1, w * c, c};
  return {c * h * w, h * w, w, 1};
}

}  // namespace convext::cuda
