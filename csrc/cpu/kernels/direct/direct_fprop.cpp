// Compiled for AVX512-BF16, too.
//
// The direct fprop: an implicit matrix product over packed weights (implicit_gemm.h has the tile map and the blocking,
// gemm.h the register budget). Takes every problem; chosen wherever no specialised kernel is cheaper.
//
//   y[n,p,q,:] = epilogue(sum_{r,s} x[n,h,w,:] * W[r,s])        M = NPQ, N = K, reduction = RSC
//
// FLOP per byte of B: every 64 B vector of weights is used by all pixels of a block, 48 to 192 of them, so weights of
// any size stream from the third-level cache at about a byte a cycle. With C <= 8 the taps of a filter row merge into
// one (gemm_passes.h).
#include "cpu/kernels/gemm/gemm_passes.h"
#include "direct.h"

CONVEXT_DEFINE_VARIANTS(fprop_direct,
                        of_volumes(packed_variant<T, GemmFprop<T, false>>(name, Algorithm::direct, Pass::kFprop,
                                                                          reject_none, direct_work)))
