// libconvext_storage: makes the storage of a tensor over the pool's memory as resizable as torch's own. The stable ABI
// has no word for that: a tensor over given memory has no allocator, so that `resize_`, and `resize_(0)` with which
// FSDP and checkpointing free a result, raise. It takes torch's C++ headers, which hold for one release of torch alone,
// hence a library of its own: where the release is another, it is not loaded, and results come from torch's own
// allocator.
#include <ATen/core/TensorBase.h>
#include <c10/core/Allocator.h>
#include <c10/core/StorageImpl.h>

#include "core/api.h"

// `tensor` is an AtenTensorHandle, which is an at::Tensor*. What torch's allocator hands out from now on is torch's;
// the memory that the storage leaves goes back to the pool by the deleter that came with it. Its address is for
// _C.use_storage.
extern "C" CONVEXT_API void convext_make_resizable(void* tensor) {
  c10::StorageImpl* storage = static_cast<at::TensorBase*>(tensor)->storage().unsafeGetStorageImpl();
  storage->set_allocator(c10::GetAllocator(c10::DeviceType::CPU));
  storage->set_resizable(true);
}
