// What host code outside of the kernels needs from the CUDA runtime, without its headers.
#pragma once
#include "core/api.h"

namespace convext::cuda {

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
