// Looks at many Python facts at once: whether each is still what it was. A swapped network relies on hundreds of them
// (which tensors its layers hold, their settings, hooks, training flags), and asking for each from Python, with caches
// cold after every layer, took longer than some of the layers.
#pragma once
#include <pybind11/pybind11.h>

#include <vector>

namespace convext {

// Facts are added once and checked together. All objects involved are kept alive; what is compared by identity may
// therefore not be another object at the same address.
class Watch {
 public:
  // dict.get(key) is value; `value` None with `absent` means that there is no such key.
  void item(pybind11::dict dict, pybind11::object key, pybind11::object value, bool absent) {
    facts_.push_back({Kind::kItem, std::move(dict), std::move(key), absent ? pybind11::object() : std::move(value)});
  }
  // not dict[key], a dictionary itself
  void empty(pybind11::dict dict, pybind11::object key) {
    facts_.push_back({Kind::kEmpty, std::move(dict), std::move(key), {}});
  }
  // len(dict) == length
  void length(pybind11::dict dict, int64_t length) {
    facts_.push_back({Kind::kLength, std::move(dict), {}, {}, length});
  }
  // [*dict.values()] are these very objects
  void values(pybind11::dict dict, pybind11::tuple values) {
    facts_.push_back({Kind::kValues, std::move(dict), {}, std::move(values)});
  }
  // [*list] are these very objects
  void elements(pybind11::list list, pybind11::tuple values) {
    facts_.push_back({Kind::kElements, std::move(list), {}, std::move(values)});
  }
  // type(object) is kind
  void type(pybind11::object object, pybind11::object kind) {
    facts_.push_back({Kind::kType, std::move(object), {}, std::move(kind)});
  }
  // getattr(object, name) is value
  void attribute(pybind11::object object, pybind11::object name, pybind11::object value) {
    facts_.push_back({Kind::kAttribute, std::move(object), std::move(name), std::move(value)});
  }

  bool holds() const {
    for (const Fact& fact : facts_) {
      if (!stands(fact)) return false;
    }
    return true;
  }
  int64_t size() const { return static_cast<int64_t>(facts_.size()); }

 private:
  enum class Kind { kItem, kEmpty, kLength, kValues, kElements, kType, kAttribute };
  struct Fact {
    Kind kind;
    pybind11::object owner, key, value;
    int64_t length = 0;
  };

  static bool stands(const Fact& fact) {
    PyObject* const owner = fact.owner.ptr();
    switch (fact.kind) {
      case Kind::kItem: return item_of(fact) == fact.value.ptr();
      case Kind::kEmpty: {
        PyObject* const found = item_of(fact);
        return found != nullptr && PyDict_Check(found) && PyDict_Size(found) == 0;
      }
      case Kind::kLength: return PyDict_Size(owner) == fact.length;
      case Kind::kValues: {
        if (PyDict_Size(owner) != PyTuple_GET_SIZE(fact.value.ptr())) return false;
        Py_ssize_t at = 0, i = 0;
        PyObject *key, *value;
        while (PyDict_Next(owner, &at, &key, &value)) {
          if (value != PyTuple_GET_ITEM(fact.value.ptr(), i++)) return false;
        }
        return true;
      }
      case Kind::kElements: {
        const Py_ssize_t size = PyList_GET_SIZE(owner);
        if (size != PyTuple_GET_SIZE(fact.value.ptr())) return false;
        for (Py_ssize_t i = 0; i < size; ++i) {
          if (PyList_GET_ITEM(owner, i) != PyTuple_GET_ITEM(fact.value.ptr(), i)) return false;
        }
        return true;
      }
      case Kind::kType: return reinterpret_cast<PyObject*>(Py_TYPE(owner)) == fact.value.ptr();
      case Kind::kAttribute: {
        const auto found = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(owner, fact.key.ptr()));
        if (!found) PyErr_Clear();
        return found.ptr() == fact.value.ptr();
      }
    }
    return false;
  }

  static PyObject* item_of(const Fact& fact) {
    PyObject* const found = PyDict_GetItemWithError(fact.owner.ptr(), fact.key.ptr());
    if (found == nullptr && PyErr_Occurred()) PyErr_Clear();
    return found;
  }

  std::vector<Fact> facts_;
};

}  // namespace convext
