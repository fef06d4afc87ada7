// What host code outside of the kernels needs from the CUDA runtime, without its headers.
#pragma once
#include <cstddef>

#include "core/api.h"

namespace convext::cuda {

// Lets a kernel have so many bytes of dynamic shared memory on the current device, which is asked for once: what a
// kernel may have is kept here for each device. nullptr, or the CUDA runtime's words for what went wrong.
const char* allow_shared_memory(const void* kernel, size_t bytes);

// Makes a device current for as long as the object lives.
class CONVEXT_API OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  const char* error() const { return error_; }  // what went wrong, or nullptr

 private:
  int former_ = -1;  // to be restored, or -1
  const char* error_ = nullptr;
};

}  // namespace convext::cuda
