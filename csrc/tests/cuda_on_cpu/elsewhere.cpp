// Hands launches to whoever has loaded this program as a library: tests/support/ptx_run.py, which runs what nvcc made of
// the kernel on the buffers as they lie in memory.
#include "emulator.h"

namespace {

using Launch = const char* (*)(const void* kernel, const uint32_t* grid, const uint32_t* block, uint64_t shared_bytes,
                               const unsigned char* parameters, uint64_t parameter_bytes);
Launch launch = nullptr;

}  // namespace

extern "C" {

void launch_with(Launch function) {
  launch = function;
  cuda_on_cpu::launch_elsewhere = [](const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                                     const cuda_on_cpu::Parameters& parameters) {
    const uint32_t grid_xyz[] = {grid.x, grid.y, grid.z}, block_xyz[] = {block.x, block.y, block.z};
    return launch(kernel, grid_xyz, block_xyz, shared_bytes, parameters.bytes.data(), parameters.bytes.size());
  };
}

// Buffer i of device memory: 1, or 0 where there are no more.
int device_buffer(uint64_t i, const void** address, uint64_t* bytes, int* read_only) {
  const auto& buffers = cuda_on_cpu::device_buffers();
  if (i >= buffers.size()) return 0;
  *address = buffers[i]->data(), *bytes = buffers[i]->bytes(), *read_only = buffers[i]->is_read_only();
  return 1;
}

}  // extern "C"
