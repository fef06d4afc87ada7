// Stands in for csrc/cuda/runtime.cpp where the kernels run on the CPU: there is one device, and it is current.
#include "../../cuda/runtime.h"

namespace convext::cuda {

OnDevice::OnDevice(int) {}
OnDevice::~OnDevice() {}

}  // namespace convext::cuda
