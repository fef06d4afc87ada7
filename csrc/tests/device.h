// Where the tests of the CUDA kernels keep device memory and wait for results: with CONVEXT_CUDA_ON_CPU on the emulator
// of cuda_on_cpu/, otherwise on a GPU.
#pragma once
#include <cstddef>

#if defined(CONVEXT_CUDA_ON_CPU)
#include <cstring>

#include "tests/cuda_on_cpu/cuda_names.h"

namespace convext::testing {

using cuda_on_cpu::Async;
using cuda_on_cpu::DeviceBuffer;
using cuda_on_cpu::Order;

inline void upload(DeviceBuffer& buffer, const void* host) {
  memcpy(buffer.data(), host, buffer.bytes());
  buffer.make_read_only();
}
inline void download(const DeviceBuffer& buffer, void* host) { memcpy(host, buffer.data(), buffer.bytes()); }
inline void set_policy(Async async, Order order, unsigned seed) {
  cuda_on_cpu::config.async = async, cuda_on_cpu::config.order = order, cuda_on_cpu::config.seed = seed;
}
inline void set_limits_of(int sm) { cuda_on_cpu::config.sm = sm; }  // of the GPU with this compute capability
inline const char* wait_for_kernels() { return nullptr; }           // a launch returns when the grid is done

constexpr bool kPoliciesMatter = true;

}  // namespace convext::testing

#else
#include <cstdio>
#include <cstdlib>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace convext::testing {

inline void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  printf("FAIL %s: %s\n", what, cudaGetErrorString(error));
  exit(1);  // errors of the device are sticky: nothing after this one would mean anything
}

// Device memory of exactly so many bytes, filled with 0xFF. Bounds are compute-sanitizer's business.
class DeviceBuffer {
 public:
  explicit DeviceBuffer(size_t bytes, bool at_start = false) : bytes_(bytes) {
    static_cast<void>(at_start);
    require(cudaMalloc(&data_, bytes), "cudaMalloc");
    require(cudaMemset(data_, 0xFF, bytes), "cudaMemset");
  }
  ~DeviceBuffer() { cudaFree(data_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

inline void upload(DeviceBuffer& buffer, const void* host) {
  require(cudaMemcpy(buffer.data(), host, buffer.bytes(), cudaMemcpyHostToDevice), "cudaMemcpy");
}
inline void download(const DeviceBuffer& buffer, void* host) {
  require(cudaMemcpy(host, buffer.data(), buffer.bytes(), cudaMemcpyDeviceToHost), "cudaMemcpy");
}

// The hardware has one policy, its own.
enum class Async { kEager, kLazy, kRandom };
enum class Order { kFifo, kLifo, kRandom };
inline void set_policy(Async, Order, unsigned) {}
inline void set_limits_of(int) {}
constexpr bool kPoliciesMatter = false;

// What went wrong since the last call, or nullptr.
inline const char* wait_for_kernels() {
  const cudaError_t error = cudaDeviceSynchronize();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace convext::testing
#endif
