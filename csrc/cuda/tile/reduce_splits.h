// The last step of every split reduction: out[i] = sum over splits of partial[split][i], always in the same order, so
// that results repeat to the bit.
#pragma once
#include "cuda/compat.h"

namespace convext::cuda {

template <class T>
__global__ void __launch_bounds__(256)
    reduce_splits(const accumulate_t<T>* __restrict__ partial, T* __restrict__ out, int64_t size, int32_t splits) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= size) return;
  accumulate_t<T> sum = 0;
#pragma unroll 4
  for (int32_t split = 0; split < splits; ++split) sum += __ldg(partial + split * size + i);
  out[i] = from_accumulate<T>(sum);
}

template <class T>
const char* launch_reduce_splits(const void* partial, void* out, int64_t size, int32_t splits, void* stream) {
  return launch_kernel(reduce_splits<T>, dim3(static_cast<unsigned>(ceil_div(size, 256))), dim3(256), 0, stream,
                       static_cast<const accumulate_t<T>*>(partial), static_cast<T*>(out), size, splits);
}

}  // namespace convext::cuda
