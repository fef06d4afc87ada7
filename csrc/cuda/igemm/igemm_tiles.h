// The tiles of the direct tensor-core family, one list for its three passes.
//
//   BLOCK_M x BLOCK_N   warps   warp tile   stages   shared memory, 64 bytes of gemm_k a row     accumulators a thread
//   256 x 128           4 x 2   64 x 64     3        3*(256+128)*64 = 72 KiB -> 3 on 228 KiB       64*64/32 = 128
//   128 x 128           2 x 4   64 x 32     4        4*(128+128)*64 = 64 KiB -> 3 blocks           64*32/32 = 64
//   128 x 64            2 x 2   64 x 32     4        4*(128+64)*64  = 48 KiB -> 4 blocks           64
//   64 x 64             2 x 2   32 x 32     4        4*(64+64)*64   = 32 KiB -> 7 blocks           32
//   64 x 32             2 x 2   32 x 16     4        4*(64+32)*64   = 24 KiB -> 9 blocks           16
//
// Registers let one block of 256 x 128 run at a time: 8 warps of more than 128 each.
//
// FLOP per byte of shared memory filled is BLOCK_M*BLOCK_N / (BLOCK_M + BLOCK_N) for 16-bit elements: 85, 64, 43, 32,
// 21.
#pragma once
#include "cuda/cost.h"
#include "cuda/tile/gemm.h"

namespace convext::cuda {

// Multiply-adds of a multiprocessor's tensor cores per clock, as the data sheets of A100 and H100 agree on.
constexpr double kHalfMma = 1024, kTf32Mma = 512;

// Residue classes of dgrad share the taps between them, and each has its own tiles.
inline double igemm_cost(const Variant& v, const ConvProblem& p) {
  const double classes = v.pass == Pass::kDgrad ? double(p.stride_h) * p.stride_w : 1;
  return tiled_cost(v, p, v.arithmetic == Arithmetic::tf32 ? kTf32Mma : kHalfMma, classes);
}

template <class T>
using Tile256x128 = Tile<T, 256, 128, 4, 2, 3>;
template <class T>
using Tile128x128 = Tile<T, 128, 128, 2, 4, 4>;
template <class T>
using Tile128x64 = Tile<T, 128, 64, 2, 2, 4>;
template <class T>
using Tile64x64 = Tile<T, 64, 64, 2, 2, 4>;
template <class T>
using Tile64x32 = Tile<T, 64, 32, 2, 2, 4>;

// X(T, dtype, k): the element types, their names, BLOCK_K.
#define CONVEXT_IGEMM_DTYPES(X) X(cuda::bf16, bf16, 32) X(cuda::fp16, f16, 32) X(float, tf32, 16)

// CONVEXT_IGEMM(T, dtype, k, tile, suffix, vector), which each pass defines, for the tiles that all dtypes have in it.
#define CONVEXT_IGEMM_TILES(T, dtype, k)            \
  CONVEXT_IGEMM(T, dtype, k, 128x128, , true)       \
  CONVEXT_IGEMM(T, dtype, k, 128x64, , true)        \
  CONVEXT_IGEMM(T, dtype, k, 64x64, , true)         \
  CONVEXT_IGEMM(T, dtype, k, 64x32, , true)         \
  CONVEXT_IGEMM(T, dtype, k, 64x64, _gather, false) \
  CONVEXT_IGEMM(T, dtype, k, 64x32, _gather, false)

}  // namespace convext::cuda
