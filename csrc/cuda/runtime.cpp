#include "runtime.h"

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>

namespace convext::cuda {

const char* allow_shared_memory(const void* kernel, size_t bytes) {
  static std::mutex lock;
  static auto& allowed = *new std::map<std::pair<const void*, int>, size_t>();  // never destroyed: calls at exit
  int device = -1;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const std::lock_guard<std::mutex> hold(lock);
  size_t& most = allowed[{kernel, device}];
  if (bytes <= most) return nullptr;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return cudaGetErrorString(error);
  most = bytes;
  return nullptr;
}

OnDevice::OnDevice(int device) {
  int current = -1;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess && current != device) {
    error = cudaSetDevice(device);
    if (error == cudaSuccess) former_ = current;
  }
  if (error != cudaSuccess) error_ = cudaGetErrorString(error);
}

OnDevice::~OnDevice() {
  if (former_ >= 0) cudaSetDevice(former_);
}

}  // namespace convext::cuda
