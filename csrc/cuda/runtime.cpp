#include "runtime.h"

#include <cuda_runtime.h>

namespace convext::cuda {

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
