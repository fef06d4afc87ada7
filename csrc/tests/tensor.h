// Tensors for the tests of CUDA kernels.
#pragma once
#include <random>
#include <vector>

#include "core/conv_problem.h"
#include "device.h"

namespace convext::testing {

constexpr double kSmallestHalf = 0x1p-24;  // half precision has no finer step than its smallest subnormal

inline double read_element(DType dtype, const void* data, int64_t i) {
  switch (dtype) {
    case DType::kFloat64: return static_cast<const double*>(data)[i];
    case DType::kFloat32: return static_cast<const float*>(data)[i];
    case DType::kBFloat16: return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    default: return __half2float(static_cast<const __half*>(data)[i]);
  }
}

inline void write_element(DType dtype, void* data, int64_t i, double value) {
  switch (dtype) {
    case DType::kFloat64: static_cast<double*>(data)[i] = value; break;
    case DType::kFloat32: static_cast<float*>(data)[i] = static_cast<float>(value); break;
    case DType::kBFloat16: static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16(static_cast<float>(value)); break;
    default: static_cast<__half*>(data)[i] = __float2half(static_cast<float>(value));
  }
}

// A tensor on the device and, as a kernel will read it, in float64. With a seed it holds uniform values in
// [center - 1, center + 1) and may not be written any more; without one it is poisoned and for a kernel to fill, and
// the first look at an element fetches all of them.
struct Tensor {
  DType dtype;
  DeviceBuffer buffer;
  std::vector<double> host;

  Tensor(DType dtype, int64_t size, bool at_start) : dtype(dtype), buffer(size * dtype_size(dtype), at_start) {}
  Tensor(DType dtype, int64_t size, bool at_start, unsigned seed, double center = 0) : Tensor(dtype, size, at_start) {
    std::mt19937 generator(seed);
    std::uniform_real_distribution<double> uniform(center - 1, center + 1);
    std::vector<unsigned char> raw(buffer.bytes());
    host.resize(size);
    for (int64_t i = 0; i < size; ++i) {
      write_element(dtype, raw.data(), i, uniform(generator));
      host[i] = read_element(dtype, raw.data(), i);
    }
    upload(buffer, raw.data());
  }
  double operator[](int64_t i) const {
    if (fetched_.empty()) {
      fetched_.resize(buffer.bytes());
      download(buffer, fetched_.data());
    }
    return read_element(dtype, fetched_.data(), i);
  }

 private:
  mutable std::vector<unsigned char> fetched_;
};

}  // namespace convext::testing
