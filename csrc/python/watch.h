// Looks at many Python facts at once: whether each is still what it was. A swapped network relies on hundreds of them
// (which tensors its layers hold, their settings, hooks, training flags), and asking for each from Python, with caches
// cold after every layer, took longer than some of the layers.
//
// Most facts are about dictionaries. CPython before 3.12 gives a dictionary another version with every change (PEP
// 509): where no version is new, what was in them is in them still, and a dictionary costs one line of memory instead
// of those of its keys and entries, which a network's weights have driven out of the caches since the last call.
#pragma once
#include <pybind11/pybind11.h>

#include <set>
#include <tuple>
#include <utility>
#include <vector>

namespace convext {

// Facts are added once and checked together. All objects involved are kept alive; what is compared by identity may
// therefore not be another object at the same address.
class Watch {
 public:
  // dict.get(key) is value; `value` None with `absent` means that there is no such key.
  void item(pybind11::dict dict, pybind11::object key, pybind11::object value, bool absent) {
    add({Kind::kItem, std::move(dict), std::move(key), absent ? pybind11::object() : std::move(value)});
  }
  // not dict[key], a dictionary itself
  void empty(pybind11::dict dict, pybind11::object key) {
    add({Kind::kEmpty, std::move(dict), std::move(key), {}});
  }
  // len(dict) == length
  void length(pybind11::dict dict, int64_t length) {
    add({Kind::kLength, std::move(dict), {}, {}, length});
  }
  // [*dict.values()] are these very objects
  void values(pybind11::dict dict, pybind11::tuple values) {
    add({Kind::kValues, std::move(dict), {}, std::move(values)});
  }
  // [*list] are these very objects
  void elements(pybind11::list list, pybind11::tuple values) {
    add({Kind::kElements, std::move(list), {}, std::move(values)});
  }
  // type(object) is kind
  void type(pybind11::object object, pybind11::object kind) {
    add({Kind::kType, std::move(object), {}, std::move(kind)});
  }
  // getattr(object, name) is value
  void attribute(pybind11::object object, pybind11::object name, pybind11::object value) {
    add({Kind::kAttribute, std::move(object), std::move(name), std::move(value)});
  }

  bool holds() {
    const bool known = !seen_.empty() && nothing_new();
    if (known) {
      for (const size_t i : elsewhere_) {
        if (!stands(facts_[i])) return false;
      }
      return true;
    }
    for (const Fact& fact : facts_) {
      if (!stands(fact)) return false;
    }
    remember();
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

  // A dictionary that a fact is about, or the one that it finds in there, as it was when all facts last stood.
  struct Seen {
    size_t fact;
    bool inner;
    pybind11::object dict;
    uint64_t version;
  };

  void add(Fact fact) {
    seen_.clear();
    elsewhere_.clear();
    facts_.push_back(std::move(fact));
  }

#if PY_VERSION_HEX < 0x030C0000
  static uint64_t version_of(const pybind11::object& dict) {
    return reinterpret_cast<const PyDictObject*>(dict.ptr())->ma_version_tag;
  }

  // In the order of `remember`: a dictionary within another is looked at after it.
  bool nothing_new() const {
    for (const Seen& seen : seen_) {
      if (version_of(seen.dict) != seen.version) return false;
    }
    return true;
  }

  // Called where every fact stands.
  void remember() {
    if (seen_.empty() && elsewhere_.empty()) list_dictionaries();
    for (Seen& seen : seen_) {
      const Fact& fact = facts_[seen.fact];
      seen.dict = seen.inner ? pybind11::reinterpret_borrow<pybind11::object>(item_of(fact)) : fact.owner;
      seen.version = version_of(seen.dict);
    }
  }

  void list_dictionaries() {
    std::set<std::tuple<Kind, PyObject*, PyObject*>> listed;
    for (size_t i = 0; i < facts_.size(); ++i) {
      const Fact& fact = facts_[i];
      if (fact.kind == Kind::kElements || fact.kind == Kind::kType || fact.kind == Kind::kAttribute) {
        if (listed.emplace(fact.kind, fact.owner.ptr(), fact.key.ptr()).second) elsewhere_.push_back(i);
        continue;
      }
      if (listed.emplace(Kind::kItem, fact.owner.ptr(), nullptr).second) seen_.push_back({i, false, {}, 0});
      if (fact.kind == Kind::kEmpty && listed.emplace(Kind::kEmpty, fact.owner.ptr(), fact.key.ptr()).second) {
        seen_.push_back({i, true, {}, 0});
      }
    }
  }
#else
  bool nothing_new() const { return false; }
  void remember() {}
#endif

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
  std::vector<Seen> seen_;
  std::vector<size_t> elsewhere_;  // facts about other objects
};

}  // namespace convext
