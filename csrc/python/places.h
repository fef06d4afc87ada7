// Where tensors lie: whether each still has the address, extents, strides, dtype and device that it had. A sequence
// keeps these of hundreds of tensors, and checks before each call (native_sequence.py); one by one in Python that would
// take as long as a layer. They are read by DLPack's C interface, a table of functions in a capsule at the
// tensor's type.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace convext {

class Places {
 public:
  // `exchange`: the capsule. The tensors are not kept alive.
  Places(const pybind11::capsule& exchange, const pybind11::list& tensors) : lookup_(lookup_of(exchange)) {
    for (const pybind11::handle tensor : tensors) {
      DLTensor now{};
      const bool known = look(tensor.ptr(), now);
      places_.push_back({known, now});
      if (!known) continue;
      extents_.insert(extents_.end(), now.shape, now.shape + now.ndim);
      extents_.insert(extents_.end(), now.strides, now.strides + now.ndim);
    }
  }

  // `tensors`: those that were given before.
  bool still(const pybind11::list& tensors) const {
    if (tensors.size() != places_.size()) return false;
    constexpr size_t kAhead = 8;
    PyObject* const* const items = reinterpret_cast<PyListObject*>(tensors.ptr())->ob_item;
    const int64_t* extents = extents_.data();
    for (size_t i = 0; i < places_.size(); ++i) {
      if (i + kAhead < places_.size()) __builtin_prefetch(items[i + kAhead]);
      const DLTensor& then = places_[i].tensor;
      DLTensor now;
      if (!places_[i].known || !look(items[i], now) || now.data != then.data || now.byte_offset != then.byte_offset ||
          now.ndim != then.ndim || std::memcmp(&now.device, &then.device, sizeof now.device) != 0 ||
          std::memcmp(&now.dtype, &then.dtype, sizeof now.dtype) != 0) {
        return false;
      }
      for (const int64_t* const values : {now.shape, now.strides}) {
        for (int32_t d = 0; d < now.ndim; ++d) {
          if (values[d] != *extents++) return false;
        }
      }
    }
    return true;
  }

 private:
  // Of dlpack.h, major version 1.
  struct DLTensor {
    void* data;
    struct {
      int32_t type, index;
    } device;
    int32_t ndim;
    struct {
      uint8_t code, bits;
      uint16_t lanes;
    } dtype;
    const int64_t *shape, *strides;
    uint64_t byte_offset;
  };
  using Lookup = int (*)(void* object, DLTensor* out);
  struct Exchange {
    uint32_t major, minor;
    void *prev, *allocate, *from_object, *to_object;
    Lookup tensor_from_object;
  };
  struct Place {
    bool known;
    DLTensor tensor;  // but for its extents and strides, which are the tensor's own
  };

  static Lookup lookup_of(const pybind11::capsule& exchange) {
    const auto* const table = static_cast<const Exchange*>(PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
    if (table == nullptr) throw pybind11::error_already_set();
    if (table->major != 1 || table->tensor_from_object == nullptr) {
      throw pybind11::value_error("convext: torch offers no DLPack table of version 1");
    }
    return table->tensor_from_object;
  }
  bool look(PyObject* tensor, DLTensor& out) const {
    if (lookup_(tensor, &out) == 0) return true;
    PyErr_Clear();
    return false;
  }

  Lookup lookup_;
  std::vector<Place> places_;
  std::vector<int64_t> extents_;  // of each tensor, and its strides
};

}  // namespace convext
