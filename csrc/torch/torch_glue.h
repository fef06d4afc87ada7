// What the torch-facing files share: torch's stable ABI in, convext's plain data out. Checks, views, allocation,
// scratch.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include "core/variant.h"
#include "cpu/runtime/output_pool.h"
#include "cpu/runtime/scratch.h"
#include "cpu/runtime/view.h"

// Of torch 2.11's stable ABI. Weak, because 2.10 has no tensor over memory that knows how to give it back: there,
// results come from torch's own allocator and the pool stays empty, as they do without csrc/storage.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* result, int32_t layout, const uint8_t* metadata,
    int64_t metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace convext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What a tensor is, without a hold on it: torch refuses to exchange or convert tensors that others hold. Its maker
// makes sure that the memory is still the tensor's (native_sequence.py).
class HeldTensor {
 public:
  explicit HeldTensor(const Tensor& t)
      : sizes_(t.sizes().begin(), t.sizes().end()),
        strides_(t.strides().begin(), t.strides().end()),
        type_(t.scalar_type()),
        cpu_(t.is_cpu()),
        contiguous_(t.is_contiguous()),
        numel_(t.numel()),
        data_(t.data_ptr()) {}
  int64_t dim() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t size(int64_t i) const { return sizes_[i]; }
  int64_t stride(int64_t i) const { return strides_[i]; }
  const std::vector<int64_t>& sizes() const { return sizes_; }
  const std::vector<int64_t>& strides() const { return strides_; }
  ScalarType scalar_type() const { return type_; }
  bool is_cpu() const { return cpu_; }
  bool is_contiguous() const { return contiguous_; }
  int64_t numel() const { return numel_; }
  void* data_ptr() const { return data_; }
  const void* const_data_ptr() const { return data_; }

 private:
  std::vector<int64_t> sizes_, strides_;
  ScalarType type_;
  bool cpu_, contiguous_;
  int64_t numel_;
  void* data_;
};

template <class AnyTensor>
DType dtype_of(const AnyTensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: STD_TORCH_CHECK(false, "convext_cpu: the dtype must be float32, float64, bfloat16 or float16");
  }
  return DType::kFloat32;
}

inline int32_t scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return aoti_torch_dtype_float64();
    case DType::kBFloat16: return aoti_torch_dtype_bfloat16();
    case DType::kFloat16: return aoti_torch_dtype_float16();
    default: return aoti_torch_dtype_float32();
  }
}

// Halves are computed in float32 and rounded once, at the end.
inline DType compute_dtype(DType dtype) { return dtype == DType::kFloat64 ? dtype : DType::kFloat32; }

template <class AnyTensor>
View view_of(const AnyTensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), "convext_cpu: ", name, " must be a CPU tensor");
  STD_TORCH_CHECK(t.dim() == 4, "convext_cpu: ", name, " must have 4 dimensions, got ", t.dim());
  View v{};
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  for (int i = 0; i < 4; ++i) v.size[i] = sizes[i], v.stride[i] = strides[i];
  v.dtype = dtype_of(t);
  v.data = t.data_ptr();
  return v;
}

// The same of an image, or of a volume whose planes and rows lie so that they are one axis.
template <class AnyTensor>
View view_of_any(const AnyTensor& t, const char* name) {
  if (t.dim() != 5) return view_of(t, name);
  STD_TORCH_CHECK(t.is_cpu(), "convext_cpu: ", name, " must be a CPU tensor");
  const auto size = t.sizes();
  const auto stride = t.strides();
  STD_TORCH_CHECK(size[2] == 1 || size[3] == 1 || stride[2] == size[3] * stride[3], "convext_cpu: ", name,
                  " must have planes and rows that are one axis");
  View v{};
  v.planes = size[2];
  v.size[0] = size[0], v.size[1] = size[1], v.size[2] = size[2] * size[3], v.size[3] = size[4];
  v.stride[0] = stride[0], v.stride[1] = stride[1], v.stride[2] = stride[size[3] == 1 ? 2 : 3], v.stride[3] = stride[4];
  v.dtype = dtype_of(t);
  v.data = t.data_ptr();
  return v;
}

// A dense tensor that is not initialised, in memory of the pool's where it is large.
inline Tensor empty(const int64_t* sizes, const int64_t* strides, int64_t dim, DType dtype) {
  AtenTensorHandle handle;
  int64_t bytes = dtype_size(dtype);
  for (int64_t i = 0; i < dim; ++i) bytes *= sizes[i];
  OutputPool& pool = OutputPool::of_process();
  const OutputPool::MakeResizable make_resizable = pool.make_resizable();
  if (bytes >= OutputPool::kSmallest && torch_from_blob != nullptr && make_resizable != nullptr && pool.limit() > 0) {
    void* data = pool.take(bytes);
    const auto give = [](void* block, void* size) {
      OutputPool::of_process().give(block, reinterpret_cast<intptr_t>(size));
    };
    TORCH_ERROR_CODE_CHECK(torch_from_blob(data, dim, sizes, strides, 0, scalar_type_of(dtype),
                                           aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(),
                                           nullptr, 0, give, reinterpret_cast<void*>(bytes)));
    Tensor result(handle);
    make_resizable(handle);
    return result;
  }
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, scalar_type_of(dtype), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor empty_activation(int64_t n, int64_t c, int64_t h, int64_t w, DType dtype, bool channels_last) {
  const int64_t sizes[4] = {n, c, h, w};
  const int64_t nchw[4] = {c * h * w, h * w, w, 1};
  const int64_t nhwc[4] = {h * w * c, 1, w * c, c};
  return empty(sizes, channels_last ? nhwc : nchw, 4, dtype);
}

inline Tensor empty_volume(int64_t n, int64_t c, int64_t d, int64_t h, int64_t w, DType dtype, bool channels_last) {
  const int64_t sizes[5] = {n, c, d, h, w};
  const int64_t ncdhw[5] = {c * d * h * w, d * h * w, h * w, w, 1};
  const int64_t ndhwc[5] = {d * h * w * c, 1, h * w * c, w * c, c};
  return empty(sizes, channels_last ? ndhwc : ncdhw, 5, dtype);
}

inline Tensor empty_matrix(int64_t rows, int64_t columns, DType dtype) {
  const int64_t sizes[2] = {rows, columns}, strides[2] = {columns, 1};
  return empty(sizes, strides, 2, dtype);
}

inline Tensor empty_vector(int64_t size, DType dtype) {
  const int64_t stride = 1;
  return empty(&size, &stride, 1, dtype);
}

inline const Parallel& torch_parallel() {
  thread_local Parallel parallel{};
  parallel.run = [](int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context) {
    torch::stable::parallel_for(begin, end, grain, [=](int64_t b, int64_t e) { body(context, b, e); });
  };
  parallel.threads = static_cast<int32_t>(torch::stable::get_num_threads());
  return parallel;
}

inline Scratch& scratch() {
  thread_local Scratch memory;
  return memory;
}

// Takes scratch for one call and gives back what is too large to keep.
struct ScratchScope {
  explicit ScratchScope(int64_t bytes) { scratch().reserve(bytes); }
  ~ScratchScope() { scratch().trim(); }
};

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(torch::headeronly::Half value) { return static_cast<float>(value); }
inline float widen(torch::headeronly::BFloat16 value) { return static_cast<float>(value); }

// Per-channel parameters of any dtype, and in one dimension of any stride, as k values of T, `absent` where there is no
// tensor.
template <class T, class Optional>
void load_channels(const Optional& t, const char* name, int64_t k, T absent, T* out) {
  if (!t) {
    for (int64_t i = 0; i < k; ++i) out[i] = absent;
    return;
  }
  STD_TORCH_CHECK(t->is_cpu() && (t->dim() == 1 || t->is_contiguous()) && t->numel() == k, "convext_cpu: ", name,
                  " must hold ", k, " values in a row on the CPU, got ", t->numel());
  const int64_t stride = t->dim() == 1 ? t->stride(0) : 1;
  const auto copy = [&](const auto* data) {
    if (stride == 1) {  // the common case, and one the compiler vectorises
      for (int64_t i = 0; i < k; ++i) out[i] = static_cast<T>(widen(data[i]));
    } else {
      for (int64_t i = 0; i < k; ++i) out[i] = static_cast<T>(widen(data[i * stride]));
    }
  };
  const void* data = t->const_data_ptr();
  switch (dtype_of(*t)) {
    case DType::kFloat32: copy(static_cast<const float*>(data)); break;
    case DType::kFloat64: copy(static_cast<const double*>(data)); break;
    case DType::kBFloat16: copy(static_cast<const torch::headeronly::BFloat16*>(data)); break;
    case DType::kFloat16: copy(static_cast<const torch::headeronly::Half*>(data)); break;
  }
}

// The same, where they lie if they lie so, else in `room`.
template <class T, class Optional>
const T* channels(const Optional& t, const char* name, int64_t k, T absent, T* room) {
  const bool same = t && (std::is_same_v<T, float> ? dtype_of(*t) == DType::kFloat32 : dtype_of(*t) == DType::kFloat64);
  if (same && t->is_cpu() && t->numel() == k && t->is_contiguous()) return static_cast<const T*>(t->const_data_ptr());
  load_channels<T>(t, name, k, absent, room);
  return room;
}

}  // namespace convext
