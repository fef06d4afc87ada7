// Compiled for AVX512-BF16, too.
//
// The direct dgrad: the same product with the filter transposed and the taps mirrored, one problem of unit stride for
// each residue of (h, w) modulo the stride, so that no zero is multiplied for the stride's sake (gemm_passes.h).
//
//   dx[n,h,w,:] = sum_{r,s} dy[n,p,q,:] * W[r,s]^T              M = NHW, N = C, reduction = RSK
//
// With few input channels (a first layer) most lanes of a vector are empty: C = 3 uses 3 lanes of 16.
#include "cpu/kernels/gemm/gemm_passes.h"
#include "direct.h"

CONVEXT_DEFINE_VARIANTS(dgrad_direct,
                        of_volumes(packed_variant<T, GemmDgrad<T, false>>(name, Algorithm::direct, Pass::kDgrad,
                                                                          reject_none, direct_work)))
