// Stands in for csrc/cuda/runtime.cpp where the kernels run on the CPU: there is one device, number 0, and it is
// current.
#include "cuda/runtime.h"

namespace convext::cuda {

OnDevice::OnDevice(int device) {
  if (device != 0) error_ = "invalid device ordinal";  // as CUDA says it
}
OnDevice::~OnDevice() {}

}  // namespace convext::cuda
