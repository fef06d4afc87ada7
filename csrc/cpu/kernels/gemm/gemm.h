// The register-tiled inner kernel that every convolution of this folder is built on:
//
//   out[i][j] = sum_{t in taps} sum_{l < depth}  a[t][i][l] * b[t][l][j]        i < rows, j < columns
//
// A is reached through pointers, one for each tap and row (pixel), so that one kernel serves every filter, stride,
// dilation and padding; B is packed: `vectors` whole vectors for each (t, l), the columns past the last one zero.
//
//                        vectors (of kWidth columns)
//                    +------+------+------+------+
//               row  | acc  | acc  | acc  | acc  |    per step l: `vectors` loads of B, one broadcast of A a row,
//                    +------+------+------+------+    rows * vectors FMAs
//              rows  |  ...                      |
//                    +------+------+------+------+
//
// Register budget: rows * vectors accumulators + vectors of B + 1 broadcast.
//   32 registers (AVX-512): 6x4 = 24+4+1, 9x3 = 27+3+1, 14x2 = 28+2+1, 14x1 = 14+1+1 (more rows need more pointers
//   than there are general registers); 16 registers: 6x2 = 12+2+1, 12x1 = 12+1+1.
//
// bfloat16 takes two steps at a time: an instruction multiplies pairs and adds both products to a float. So the depth
// of B is packed in pairs, lane by lane, (depth / 2, columns, 2), a last single l with a zero beside it; the broadcast
// is 32 bits of A; sums are floats, and rounded to bfloat16 once, in the epilogue. A reduction in parts therefore
// leaves its sums in `partial`, not in the output.
#pragma once
#include "cpu/simd/half.h"

namespace convext::CONVEXT_ISA {

// Most vectors side by side in a register tile, and most rows for that many vectors.
constexpr int kMaxVectors = kVectorRegisters == 32 ? 4 : 2;
constexpr int max_rows(int vectors) {
  if (kVectorRegisters == 32) return vectors == 1 ? 14 : vectors == 2 ? 14 : vectors == 3 ? 9 : 6;
  return vectors == 1 ? 12 : 6;
}
constexpr int kMaxRows = 14;

// Tiles with fewer vectors have no general register left for the address.
constexpr int kPrefetchingVectors = 3;

// Steps of the reduction that one multiplication takes, and the depth of B in memory.
template <class T>
constexpr int kDepthStep = sizeof(T) == 2 ? 2 : 1;
template <class T>
constexpr int64_t packed_depth(int64_t depth) {
  return (depth + kDepthStep<T> - 1) / kDepthStep<T> * kDepthStep<T>;
}

// Whether the sum of a part of a reduction fits into the output without rounding.
template <class T>
constexpr bool kPartialInOutput = sizeof(T) == sizeof(compute_t<T>);

template <class T>
struct TileArgs {
  using C = compute_t<T>;
  const T* const* rows;  // pointer of (tap t, row i) at rows[t * rows_pitch + i]
  int64_t rows_pitch;
  const int32_t* taps;  // the taps to sum over
  int32_t num_taps;
  int32_t depth;     // elements of A summed over for each tap
  int64_t a_offset;  // added to every pointer of A
  const T* b;        // tap t's packed (depth, vectors * width) weights are at b + b_taps[t] * b_tap_pitch
  const int32_t* b_taps;
  int64_t b_tap_pitch;
  const T* ahead;  // weights that are needed later: a tile fetches a line of them for every step, if it has
                   // at least kPrefetchingVectors
  T* const* out;   // row i goes to out[i] + out_offset
  int64_t out_offset;
  int32_t columns;    // how many columns to write
  bool accumulate;    // add to what `out`, or `partial`, holds
  bool finish;        // the sum is complete: apply the epilogue below
  C* partial;         // unless kPartialInOutput: (rows, vectors * width) sums that wait for the rest
  const C* scale;     // for column 0, or nullptr
  const C* shift;     // for column 0, or nullptr
  const T* residual;  // at the same distance from `residual` as the output is from `out_base`, or nullptr
  const T* out_base;
  Activation activation;
};

// kernel_of(rows, vectors), two std::integral_constants, for every tile that the registers hold, filled at compile
// time. What holds more than accumulators, or in a wider tile, says how many rows are left: MOST_ROWS(vectors).
template <class Kernel, int MOST_VECTORS = kMaxVectors, int (*MOST_ROWS)(int) = max_rows>
class TileTable {
 public:
  template <class F>
  constexpr explicit TileTable(F kernel_of) : kernels_{} {
    fill<1, 1>(kernel_of);
  }
  constexpr Kernel of(int rows, int vectors) const { return kernels_[vectors - 1][rows - 1]; }

 private:
  template <int ROWS, int VECTORS, class F>
  constexpr void fill(F kernel_of) {
    if constexpr (VECTORS <= MOST_VECTORS) {
      if constexpr (ROWS <= MOST_ROWS(VECTORS)) {
        kernels_[VECTORS - 1][ROWS - 1] =
            kernel_of(std::integral_constant<int, ROWS>{}, std::integral_constant<int, VECTORS>{});
        fill<ROWS + 1, VECTORS>(kernel_of);
      } else {
        fill<1, VECTORS + 1>(kernel_of);
      }
    }
  }
  Kernel kernels_[MOST_VECTORS][kMaxRows];
};

template <class T>
using TileKernel = void (*)(const TileArgs<T>&);

// The kernel for a tile of rows x vectors, 1 <= vectors <= kMaxVectors, 1 <= rows <= max_rows(vectors).
template <class T>
TileKernel<T> tile_kernel(int rows, int vectors);

// ---- N columns cut into panels of at most kMaxVectors vectors, as evenly as they go: 5 vectors into 3 + 2 ----

template <class T>
struct Panels {
  static constexpr int kWidth = VecOf<T>::width;
  int32_t columns;  // N
  int32_t vectors;  // ceil(N / width)
  int32_t count;

  CONVEXT_INLINE explicit Panels(int32_t n)
      : columns(n), vectors((n + kWidth - 1) / kWidth), count((vectors + kMaxVectors - 1) / kMaxVectors) {}

  // First vector of a panel; panels 0 .. vectors % count - 1 are one vector wider than the others.
  CONVEXT_INLINE int32_t begin(int32_t panel) const {
    const int32_t wide = vectors % count;
    return panel * (vectors / count) + (panel < wide ? panel : wide);
  }
  CONVEXT_INLINE int32_t width(int32_t panel) const { return begin(panel + 1) - begin(panel); }
  CONVEXT_INLINE int32_t first_column(int32_t panel) const { return begin(panel) * kWidth; }
  CONVEXT_INLINE int32_t num_columns(int32_t panel) const {
    const int32_t end = begin(panel + 1) * kWidth;
    return (end < columns ? end : columns) - first_column(panel);
  }
};

}  // namespace convext::CONVEXT_ISA
