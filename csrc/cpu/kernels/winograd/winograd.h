// 3x3 filters of stride 1 by Winograd's minimal filtering F(m x m, 3 x 3): (m+2)^2 multiplications for the m^2 outputs
// of a tile, where the sum itself takes 9 m^2. Both passes that filter an image run on it:
//
//   out[m, :] = epilogue( sum_{tap} in[pixel(m, tap), :] * B[tap] )      fprop: x, w -> y;  dgrad: dy, w rotated -> dx
//
//   m   multiplications an output   points                          what its arithmetic costs in accuracy
//   2   4    (9 directly)           0, +-1, infinity                nothing: no more error than the sum itself
//   3   2.78                        +-1/2, +-5/4, infinity          as much error as the sum itself, or a little more
//   4   2.25                        0, +-3/4, +-3/2, infinity       several times the error of the sum
//
// (docs/design.md derives the bounds.) A tile with an output that is not finite is summed directly (winograd_direct.h).
#pragma once
#include "cpu/kernels/gemm/gemm.h"

namespace convext::CONVEXT_ISA {

// One spatial axis. Output o, tap r reads o + offset + r * step, which is padding outside [0, in). With a dilated
// filter the outputs that are equal modulo the step (a phase) read inputs that are equal modulo the step: each phase
// is an undilated convolution of its own, over tiles whose inputs and outputs lie a step apart.
struct WinogradAxis {
  int32_t in, out;
  int32_t offset, step;

  int32_t phases() const { return step < out ? step : out; }
  // Tiles of m outputs in the longest phase; the last ones of the other phases may be empty.
  int32_t tiles(int32_t m) const { return ((out + step - 1) / step + m - 1) / m; }
};

// T: the type of input, output, residual and weights in memory. All arithmetic is float's: bfloat16 is widened as a
// tile is read and rounded once, as it is written.
template <class T>
struct Winograd {
  const T* in;          // (batch, height.in, width.in, depth)
  T* out;               // (batch, height.out, width.out, columns)
  const float* packed;  // winograd_pack() made it
  int32_t batch, depth, columns;
  WinogradAxis height, width;
  Epilogue epilogue;

  // Where weight(column, l, tap) lies in what `weights` copies: see winograd_pack.
  WeightSource weights;
  int64_t column_pitch, depth_pitch;
  bool rotated;
};

// M is 2, 3 or 4 throughout.

// Elements of the transformed weights of (9, depth, columns).
template <int M>
int64_t winograd_packed_elements(int32_t depth, int32_t columns);

// Transforms weight(column, l, tap) = w[column * column_pitch + l * depth_pitch + (rotated ? 8 - tap : tap)], with the
// pitches, depth and columns of `g`; nothing else of it need be known yet.
template <int M, class T>
void winograd_pack(const Winograd<T>& g, const T* w, float* packed, const Parallel&);

// Scratch memory in bytes; `in`, `out`, `packed` and `weights` need not be known yet.
template <int M, class T>
int64_t winograd_workspace(const Winograd<T>&, int32_t threads);

// Returns nullptr, or what went wrong in words.
template <int M, class T>
const char* run_winograd(const Winograd<T>&, void* workspace, const Parallel&);

// X(type, name, ...) for the types that this instruction set has Winograd's kernels for.
#if defined(__AVX512BF16__)
#define CONVEXT_FOR_WINOGRAD(X, ...) X(::convext::CONVEXT_ISA::BFloat16, bf16, ##__VA_ARGS__)
#else
#define CONVEXT_FOR_WINOGRAD(X, ...) X(float, f32, ##__VA_ARGS__)
#endif

}  // namespace convext::CONVEXT_ISA
