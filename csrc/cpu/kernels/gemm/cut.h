// How a count is cut into pieces of limited size.
#pragma once
#include "cpu/simd/vec.h"

namespace convext::CONVEXT_ISA {

// `count` things cut into pieces of at most `most`, as evenly as they go: visit(begin, length).
template <class F>
CONVEXT_INLINE void cut(int32_t count, int32_t most, F&& visit) {
  const int32_t pieces = (count + most - 1) / most, size = count / pieces, larger = count % pieces;
  for (int32_t i = 0, begin = 0; i < pieces; ++i) {
    const int32_t length = size + (i < larger);
    visit(begin, length);
    begin += length;
  }
}

}  // namespace convext::CONVEXT_ISA
