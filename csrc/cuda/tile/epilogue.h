// The fused epilogue for a run of N neighbouring channels of one output pixel, in registers.
#pragma once
#include "../compat.h"

namespace convext::cuda {

// v[i] is the accumulator of channel k + i and becomes the value of y[offset + i], for i < count. With VECTOR, y and
// the residual may be read 16 bytes at a time at this offset.
template <class T, bool VECTOR, int N>
CONVEXT_DEVICE void apply_epilogue(const Epilogue& epilogue, accumulate_t<T> (&v)[N], int32_t k, int64_t offset,
                                   int32_t count = N) {
  using Acc = accumulate_t<T>;
  if (epilogue.scale) {
    const Acc* scale = static_cast<const Acc*>(epilogue.scale) + k;
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] *= i < count ? __ldg(scale + i) : Acc(0);
  }
  if (epilogue.shift) {
    const Acc* shift = static_cast<const Acc*>(epilogue.shift) + k;
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] += i < count ? __ldg(shift + i) : Acc(0);
  }
  if (epilogue.residual) {
    const T* residual = static_cast<const T*>(epilogue.residual) + offset;
    if constexpr (VECTOR) {
      static_assert(N % Vector<T>::kSize == 0, "a whole number of 16-byte vectors");
#pragma unroll
      for (int i = 0; i < N; i += Vector<T>::kSize) {
        const Vector<T> r = load_vector(residual + i);
#pragma unroll
        for (int j = 0; j < Vector<T>::kSize; ++j) v[i + j] += to_accumulate(r.v[j]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] += i < count ? to_accumulate(__ldg(residual + i)) : Acc(0);
    }
  }
  visit_activation<Acc>(epilogue.activation, [&](auto activation) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = activation.forward(v[i]);
  });
}

}  // namespace convext::cuda
