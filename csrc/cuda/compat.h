// The one door to CUDA for kernels: nvcc's own headers, or the emulation that tests use, a header that
// CONVEXT_CUDA_ON_CPU names.
#pragma once

#if defined(CONVEXT_CUDA_ON_CPU)
#include CONVEXT_CUDA_ON_CPU
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/runtime.h"

// All shared memory is dynamic: its size is the launch's, and a test can put its end against a guard page.
#define CONVEXT_SHARED_MEMORY(name) extern __shared__ __align__(1024) unsigned char name[]

namespace convext::cuda {

// Launches the kernel. nullptr, or the CUDA runtime's words for what went wrong. Legal while a stream is being
// captured.
template <class... Parameters, class... Arguments>
const char* launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                          Arguments... arguments) {
  constexpr size_t kSharedWithoutAsking = 48 * 1024;
  if (shared_bytes > kSharedWithoutAsking) {
    if (const char* error = allow_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes)) return error;
  }
  // clang-format off: it would part the launch's closing brackets
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(static_cast<Parameters>(arguments)...);
  // clang-format on
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace convext::cuda
#endif

#define CONVEXT_DEVICE __device__ __forceinline__

#include "core/variant.h"

namespace convext::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

// float where T is at most 32 bits wide: what a kernel accumulates in.
template <class T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename AccumulateOf<T>::type;

CONVEXT_DEVICE float to_accumulate(float v) { return v; }
CONVEXT_DEVICE double to_accumulate(double v) { return v; }
CONVEXT_DEVICE float to_accumulate(bf16 v) { return __bfloat162float(v); }
CONVEXT_DEVICE float to_accumulate(fp16 v) { return __half2float(v); }

template <class T>
CONVEXT_DEVICE T from_accumulate(accumulate_t<T> v);
template <>
CONVEXT_DEVICE float from_accumulate<float>(float v) {
  return v;
}
template <>
CONVEXT_DEVICE double from_accumulate<double>(double v) {
  return v;
}
template <>
CONVEXT_DEVICE bf16 from_accumulate<bf16>(float v) {
  return __float2bfloat16(v);
}
template <>
CONVEXT_DEVICE fp16 from_accumulate<fp16>(float v) {
  return __float2half(v);
}

template <class T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::kFloat32;
  static constexpr Arithmetic arithmetic = Arithmetic::float32, on_tensor_cores = Arithmetic::tf32;
};
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::kFloat64;
  static constexpr Arithmetic arithmetic = Arithmetic::float64;
};
template <>
struct DTypeOf<bf16> {
  static constexpr DType value = DType::kBFloat16;
  static constexpr Arithmetic arithmetic = Arithmetic::float32, on_tensor_cores = Arithmetic::bfloat16;
};
template <>
struct DTypeOf<fp16> {
  static constexpr DType value = DType::kFloat16;
  static constexpr Arithmetic arithmetic = Arithmetic::float32, on_tensor_cores = Arithmetic::float16;
};

// What all kernels here say about themselves.
template <class T>
constexpr Variant cuda_variant(const char* name, Algorithm algorithm, Pass pass, Layouts layouts,
                               Arithmetic arithmetic = DTypeOf<T>::arithmetic) {
  Variant v{};
  v.name = name, v.algorithm = algorithm, v.device = Device::kCUDA, v.pass = pass;
  v.dtype = DTypeOf<T>::value, v.arithmetic = arithmetic, v.isa = Isa::kSM80, v.layouts = layouts;
  return v;
}

// The order of the weights that the direct kernels read, and of the weight gradients that they write.
inline const char* krsc_format(const ConvProblem&) { return "krsc"; }

// 16 bytes of T, what one thread loads at a time.
template <class T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};

CONVEXT_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
CONVEXT_HD constexpr int32_t min_of(int32_t a, int32_t b) { return a < b ? a : b; }
CONVEXT_HD constexpr int32_t max_of(int32_t a, int32_t b) { return a > b ? a : b; }

// Division of 0 <= n < 2^31 by a constant of the launch, as one multiplication and one shift: with
// l = ceil(log2 d) and m = floor(2^32 (2^l - d) / d) + 1, n / d = (mulhi(m, n) + n) >> l. The sum stays below 2^32
// because mulhi(m, n) < n. (Granlund and Montgomery, "Division by invariant integers using multiplication", 1994.)
struct FastDiv {
  uint32_t divisor = 1, multiplier = 1, shift = 0;
  FastDiv() = default;
  CONVEXT_HD explicit FastDiv(int64_t d) : divisor(static_cast<uint32_t>(d)) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1);
  }
  CONVEXT_DEVICE void operator()(uint32_t n, int32_t& quotient, int32_t& remainder) const {
    quotient = static_cast<int32_t>((__umulhi(multiplier, n) + n) >> shift);
    remainder = static_cast<int32_t>(n) - quotient * static_cast<int32_t>(divisor);
  }
};

}  // namespace convext::cuda
