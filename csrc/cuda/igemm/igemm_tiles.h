// The tiles of the direct tensor-core family, one list for its three passes.
//
//   BLOCK_M x BLOCK_N   warps   warp tile   stages   shared memory, 128 bytes of gemm_k a row   accumulators a thread
//   256 x 128           4 x 2   64 x 64     2        2*(256+128)*128 = 96 KiB                    64*64/32 = 128
//   128 x 128           2 x 4   64 x 32     2        2*(128+128)*128 = 64 KiB                    64*32/32 = 64
//   128 x 64            2 x 2   64 x 32     2        2*(128+64)*128  = 48 KiB                    64
//   64 x 64             2 x 2   32 x 32     3        3*(64+64)*128   = 48 KiB                    32
//   64 x 32             2 x 2   32 x 16     4        4*(64+32)*128   = 48 KiB                    16
//
// Registers let one block of 256 x 128 run at a time, 8 warps of more than 128 each; of the others a multiprocessor of
// sm_90 holds 16 warps, whose 128 registers are what the compiler is held to. What it makes of them (tests/cuda):
//
// @sass igemm_pixels<Tile<float, 256, 128, .*, true>      shared=98368 warps=8 per_mma=3.9
// @sass igemm_pixels<Tile<float, 128, 128, .*, true>      shared=73792 warps=16 per_mma=9
// @sass igemm_pixels<Tile<float, 128, 64, .*, true>       shared=53312 warps=16 warps_sm_80=12 per_mma=9
// @sass igemm_pixels<Tile<float, 64, 64, .*, true>        shared=49216 warps=16 warps_sm_80=12 per_mma=11
// @sass igemm_pixels<Tile<float, 64, 32, .*, true>        shared=49216 warps=16 warps_sm_80=12 per_mma=15
// @sass igemm_pixels<Tile<.*, 256, 128, .*, true>         shared=98368 warps=8 per_mma=2
// @sass igemm_pixels<Tile<.*, 128, 128, .*, true>         shared=73792 warps=16 per_mma=3
// @sass igemm_pixels<Tile<.*, 128, 64, .*, true>          shared=53312 warps=16 warps_sm_80=12 per_mma=3.4
// @sass igemm_pixels<Tile<.*, 64, 64, .*, true>           shared=49216 warps=16 warps_sm_80=12 per_mma=3.8
// @sass igemm_pixels<Tile<.*, 64, 32, .*, true>           shared=49216 warps=16 warps_sm_80=12 per_mma=5.7
// @sass igemm_pixels<Tile<.*, 64, 64, .*, 64>, .*, false> shared=32768 warps=16 per_mma=160
// @sass igemm_pixels<Tile<.*, 64, 32, .*, 64>, .*, false> shared=24576 warps=16 per_mma=250
// @sass igemm_wgrad<Tile<float, 256, 128, .*, true>       shared=98304 warps=8 per_mma=6
// @sass igemm_wgrad<Tile<float, 128, 128, .*, true>       shared=65536 warps=16 per_mma=10
// @sass igemm_wgrad<Tile<float, 128, 64, .*, true>        shared=49152 warps=16 warps_sm_80=12 per_mma=10
// @sass igemm_wgrad<Tile<float, 64, 64, .*, true>         shared=49152 warps=16 warps_sm_80=12 per_mma=13
// @sass igemm_wgrad<Tile<float, 64, 32, .*, true>         shared=49152 warps=16 warps_sm_80=12 per_mma=18
// @sass igemm_wgrad<Tile<.*, 256, 128, .*, true>          shared=98304 warps=8 per_mma=2.5
// @sass igemm_wgrad<Tile<.*, 128, 128, .*, true>          shared=65536 warps=16 per_mma=4
// @sass igemm_wgrad<Tile<.*, 128, 64, .*, true>           shared=49152 warps=16 warps_sm_80=12 per_mma=4.2
// @sass igemm_wgrad<Tile<.*, 64, 64, .*, true>            shared=49152 warps=16 warps_sm_80=12 per_mma=6
// @sass igemm_wgrad<Tile<.*, 64, 32, .*, true>            shared=49152 warps=16 warps_sm_80=12 per_mma=9
// @sass igemm_wgrad<Tile<.*, 64, 64, .*, 64>, false>      shared=32768 warps=16 per_mma=160
// @sass igemm_wgrad<Tile<.*, 64, 32, .*, 64>, false>      shared=24576 warps=16 per_mma=250
//
// A gather's loop is its loads, element by element. What bounds the others is shared memory, of which a warp tile of
// 64 x 32 reads 12 KiB for 64 * 32 * 64 products of 16 bits; with 64 x 64, the tensor cores.
//
// FLOP per byte of shared memory filled is BLOCK_M*BLOCK_N / (BLOCK_M + BLOCK_N) for 16-bit elements: 85, 64, 43, 32,
// 21.
#pragma once
#include "cuda/cost.h"
#include "cuda/tile/gemm.h"

namespace convext::cuda {

// Residue classes of dgrad share the taps between them, and each has its own tiles.
inline double igemm_cost(const Variant& v, const ConvProblem& p) {
  const double classes = v.pass == Pass::kDgrad ? double(p.stride_h) * p.stride_w : 1;
  return tiled_cost(v, p, v.arithmetic == Arithmetic::tf32 ? kTf32Mma : kHalfMma, classes);
}

template <class T>
using Tile256x128 = Tile<T, 256, 128, 4, 2, 2, 1>;
template <class T>
using Tile128x128 = Tile<T, 128, 128, 2, 4, 2, 2>;
template <class T>
using Tile128x64 = Tile<T, 128, 64, 2, 2, 2, 4>;
template <class T>
using Tile64x64 = Tile<T, 64, 64, 2, 2, 3, 4>;
template <class T>
using Tile64x32 = Tile<T, 64, 32, 2, 2, 4, 4>;
// What collects its operands element by element has twice the code for each chunk of a stage.
template <class T>
using Gather64x64 = Tile<T, 64, 64, 2, 2, 4, 4, 64>;
template <class T>
using Gather64x32 = Tile<T, 64, 32, 2, 2, 4, 4, 64>;

// X(T, dtype, k, gathered_k): the element types, their names, BLOCK_K.
#define CONVEXT_IGEMM_DTYPES(X) X(cuda::bf16, bf16, 64, 32) X(cuda::fp16, f16, 64, 32) X(float, tf32, 32, 16)

// CONVEXT_IGEMM(T, dtype, k, form, tile, suffix, vector), which each pass defines, for the tiles that all dtypes have
// in it.
#define CONVEXT_IGEMM_TILES(T, dtype, k, gathered_k)                 \
  CONVEXT_IGEMM(T, dtype, k, Tile, 128x128, , true)                  \
  CONVEXT_IGEMM(T, dtype, k, Tile, 128x64, , true)                   \
  CONVEXT_IGEMM(T, dtype, k, Tile, 64x64, , true)                    \
  CONVEXT_IGEMM(T, dtype, k, Tile, 64x32, , true)                    \
  CONVEXT_IGEMM(T, dtype, gathered_k, Gather, 64x64, _gather, false) \
  CONVEXT_IGEMM(T, dtype, gathered_k, Gather, 64x32, _gather, false)

}  // namespace convext::cuda
