// Guards: what a plan was made from, checked before each of its calls. A swapped network relies on hundreds of facts
// about Python objects (which tensors its layers hold, their settings, hooks, training flags, what globals and classes
// say), and asking for each from Python, with caches cold after every layer, took longer than some of the layers.
//
// Most facts are about dictionaries. CPython before 3.12 gives a dictionary another version with every change (PEP
// 509): where no version is new, what was in them is in them still, and a dictionary costs one line of memory instead
// of those of its keys and entries, which a network's weights have driven out of the caches since the last call.
// Classes have such a version in every release: it is new after each change of the class or of one of its bases.
#pragma once
#include <pybind11/pybind11.h>

#include <cstring>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

namespace convext {

// Facts are added once and checked together. All objects involved are kept alive; what is compared by identity may
// therefore not be another object at the same address. One object is not kept: the owner, which holds the plan that
// holds the guards. It is given to `holds`, and facts about it are added with None in its place, or in that of its
// dictionary.
class Guards {
 public:
  // dict[key] is value, or both are equal numbers, strings or tuples of such
  void item(pybind11::object dict, pybind11::object key, pybind11::object value) {
    add({Kind::kItem, dictionary(std::move(dict)), std::move(key), std::move(value)});
  }
  // there is no dict[key]
  void absent(pybind11::object dict, pybind11::object key) {
    add({Kind::kItem, dictionary(std::move(dict)), std::move(key), {}});
  }
  // type(dict[key]) is kind
  void item_type(pybind11::object dict, pybind11::object key, pybind11::object kind) {
    add({Kind::kItemType, dictionary(std::move(dict)), std::move(key), std::move(kind)});
  }
  // the dictionary holds these keys and values in this order, and nothing else
  void contents(pybind11::object dict, pybind11::tuple keys, pybind11::tuple values) {
    add({Kind::kContents, dictionary(std::move(dict)), std::move(keys), std::move(values)});
  }
  // the dictionary holds these keys in this order, and values of exactly these types
  void kinds(pybind11::object dict, pybind11::tuple keys, pybind11::tuple types) {
    add({Kind::kKinds, dictionary(std::move(dict)), std::move(keys), std::move(types)});
  }
  // bool(dict[key]) is `expected`, dict[key] being a dictionary itself
  void filled(pybind11::object dict, pybind11::object key, bool expected) {
    add({expected ? Kind::kFilled : Kind::kEmpty, dictionary(std::move(dict)), std::move(key), {}});
  }
  // [*list] are these very objects
  void elements(pybind11::list list, pybind11::tuple values) {
    add({Kind::kElements, std::move(list), {}, std::move(values)});
  }
  // set == members
  void members(pybind11::object set, pybind11::frozenset members) {
    add({Kind::kMembers, std::move(set), {}, std::move(members)});
  }
  // type(object) is kind
  void type(pybind11::object object, pybind11::object kind) {
    add({Kind::kType, std::move(object), {}, std::move(kind)});
  }
  // vars(object) is dict
  void dict_of(pybind11::object object, pybind11::dict dict) {
    add({Kind::kDictOf, std::move(object), {}, std::move(dict)});
  }
  // what the class or the first of its bases that has it says of a name is value
  void class_item(pybind11::type kind, pybind11::str name, pybind11::object value) {
    PyUnicode_InternInPlace(&name.ptr());
    add({Kind::kClassItem, std::move(kind), std::move(name), std::move(value)});
  }
  // neither the class nor a base has the name
  void class_absent(pybind11::type kind, pybind11::str name) { class_item(std::move(kind), std::move(name), {}); }
  // a Python function's code, defaults and defaults by name (None where there are none) are these
  void function(pybind11::object function, pybind11::object code, pybind11::tuple defaults) {
    if (!PyFunction_Check(function.ptr())) throw pybind11::type_error("function: expected a Python function");
    add({Kind::kFunction, std::move(function), std::move(code), std::move(defaults)});
  }
  // a closure's cell holds value
  void cell(pybind11::object cell, pybind11::object value) {
    if (!PyCell_Check(cell.ptr())) throw pybind11::type_error("cell: expected a cell");
    add({Kind::kCell, std::move(cell), {}, std::move(value)});
  }
  // getattr(object, name) is value
  void attribute(pybind11::object object, pybind11::object name, pybind11::object value) {
    add({Kind::kAttribute, std::move(object), std::move(name), std::move(value)});
  }

  // Whether every fact stands.
  bool holds(const pybind11::object& owner) {
    pybind11::object owned;
    if (!owner.is_none()) {
      owned = pybind11::reinterpret_steal<pybind11::object>(PyObject_GenericGetDict(owner.ptr(), nullptr));
      if (!owned) PyErr_Clear();
    }
    const Subject subject{owner.ptr(), owned.ptr()};
    if (remembered_ && nothing_new(subject)) {
      for (const size_t i : elsewhere_) {
        if (!stands(facts_[i], subject)) return false;
      }
      return true;
    }
    remembered_ = false;
    for (const Fact& fact : facts_) {
      if (!stands(fact, subject)) return false;
    }
    remember(subject);
    return true;
  }

  // The first fact that does not stand, in words, or None: for whoever wonders why a plan was made anew.
  pybind11::object broken(const pybind11::object& owner) {
    static constexpr const char* kNames[] = {"item",       "item_type", "contents", "kinds",    "empty",
                                             "filled",     "elements",  "members",  "type",     "dict_of",
                                             "class_item", "function",  "cell",     "attribute"};
    const auto owned =
        owner.is_none() ? pybind11::object()
                        : pybind11::reinterpret_steal<pybind11::object>(PyObject_GenericGetDict(owner.ptr(), nullptr));
    const Subject subject{owner.ptr(), owned.ptr()};
    for (const Fact& fact : facts_) {
      if (stands(fact, subject)) continue;
      return pybind11::make_tuple(kNames[static_cast<int>(fact.kind)],
                                  fact.key ? fact.key : pybind11::object(pybind11::none()));
    }
    return pybind11::none();
  }
  int64_t size() const { return static_cast<int64_t>(facts_.size()); }

  // For the garbage collector: user objects among the facts may lead back to whoever holds these guards.
  int traverse(visitproc visit, void* arg) const {
    for (const Fact& fact : facts_) {
      Py_VISIT(fact.owner.ptr());
      Py_VISIT(fact.key.ptr());
      Py_VISIT(fact.value.ptr());
    }
    return 0;
  }
  void clear() {
    seen_.clear();
    elsewhere_.clear();
    remembered_ = false;
    std::vector<Fact> dropped;  // their ends may run Python code, which must find these guards in order
    dropped.swap(facts_);
  }

 private:
  enum class Kind {
    kItem,
    kItemType,
    kContents,
    kKinds,
    kEmpty,
    kFilled,
    kElements,
    kMembers,
    kType,
    kDictOf,
    kClassItem,
    kFunction,
    kCell,
    kAttribute
  };
  struct Fact {
    Kind kind;
    pybind11::object owner, key, value;  // owner None: the owner that `holds` is given, or its dictionary
  };
  struct Subject {
    PyObject *owner, *dict;
  };

  // What had a version when all facts last stood: a dictionary that facts are about, one that is an item of such a one
  // (it stands behind that in the list, and is there as long as that is as it was), the owner's dictionary, or a class.
  struct Seen {
    enum { kDict, kOwned, kClass } of;
    PyObject* object;
    uint64_t version;
  };

  static pybind11::object dictionary(pybind11::object dict) {
    if (!dict.is_none() && !PyDict_Check(dict.ptr())) {
      throw pybind11::type_error("expected a dict, or None for the owner's");
    }
    return dict;
  }

  void add(Fact fact) {
    remembered_ = false;
    facts_.push_back(std::move(fact));
  }

  static bool about_dict(Kind kind) { return kind <= Kind::kFilled; }

  static uint64_t class_version(PyObject* type) {
    auto* const kind = reinterpret_cast<PyTypeObject*>(type);
    return PyType_HasFeature(kind, Py_TPFLAGS_VALID_VERSION_TAG) ? kind->tp_version_tag : 0;
  }

#if PY_VERSION_HEX < 0x030C0000
  static constexpr bool kDictVersions = true;
  static uint64_t dict_version(PyObject* dict) { return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag; }
#else
  static constexpr bool kDictVersions = false;
  static uint64_t dict_version(PyObject*) { return 0; }
#endif

  bool nothing_new(const Subject& subject) const {
    for (const Seen& seen : seen_) {
      if (seen.of == Seen::kClass) {
        if (class_version(seen.object) != seen.version) return false;
      } else {
        PyObject* const dict = seen.of == Seen::kOwned ? subject.dict : seen.object;  // no two have had one version
        if (dict == nullptr || dict_version(dict) != seen.version) return false;
      }
    }
    return true;
  }

  // Called where every fact stands. Facts without a version are checked in every call.
  void remember(const Subject& subject) {
    seen_.clear();
    elsewhere_.clear();
    std::set<std::tuple<Kind, PyObject*, PyObject*>> listed;
    for (size_t i = 0; i < facts_.size(); ++i) {
      const Fact& fact = facts_[i];
      PyObject* const owner = fact.owner.ptr();
      if (about_dict(fact.kind) && kDictVersions) {
        PyObject* const dict = dict_of_fact(fact, subject);
        if (listed.emplace(Kind::kItem, dict, nullptr).second) {
          seen_.push_back({owner == Py_None ? Seen::kOwned : Seen::kDict, dict, dict_version(dict)});
        }
        if (fact.kind == Kind::kEmpty || fact.kind == Kind::kFilled) {
          PyObject* const inner = item_of(dict, fact.key.ptr());
          if (listed.emplace(Kind::kItem, inner, nullptr).second) {
            seen_.push_back({Seen::kDict, inner, dict_version(inner)});
          }
        }
      } else if (fact.kind == Kind::kClassItem && class_version(owner) != 0) {
        if (listed.emplace(fact.kind, owner, nullptr).second) {
          seen_.push_back({Seen::kClass, owner, class_version(owner)});
        }
      } else if (about_dict(fact.kind) || listed.emplace(fact.kind, owner, fact.key.ptr()).second) {
        elsewhere_.push_back(i);
      }
    }
    remembered_ = true;
  }

  static PyObject* dict_of_fact(const Fact& fact, const Subject& subject) {
    return fact.owner.is_none() ? subject.dict : fact.owner.ptr();
  }

  static PyObject* item_of(PyObject* dict, PyObject* key) {
    PyObject* const found = dict == nullptr ? nullptr : PyDict_GetItemWithError(dict, key);
    if (found == nullptr && PyErr_Occurred()) PyErr_Clear();
    return found;
  }

  // One object, or numbers, strings or tuples of such that nobody can distinguish.
  static bool same(PyObject* a, PyObject* b) {
    if (a == b) return true;
    if (a == nullptr || b == nullptr || Py_TYPE(a) != Py_TYPE(b)) return false;
    if (PyFloat_CheckExact(a)) {  // not 0.0 for -0.0
      const double x = PyFloat_AS_DOUBLE(a), y = PyFloat_AS_DOUBLE(b);
      return std::memcmp(&x, &y, sizeof x) == 0;
    }
    if (PyLong_CheckExact(a) || PyUnicode_CheckExact(a)) {
      const int equal = PyObject_RichCompareBool(a, b, Py_EQ);
      if (equal < 0) PyErr_Clear();
      return equal == 1;
    }
    if (!PyTuple_CheckExact(a) || PyTuple_GET_SIZE(a) != PyTuple_GET_SIZE(b)) return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(a); ++i) {
      if (!same(PyTuple_GET_ITEM(a, i), PyTuple_GET_ITEM(b, i))) return false;
    }
    return true;
  }

  static bool is(const pybind11::object& found, const Fact& fact) {
    if (!found) PyErr_Clear();
    return found && found.ptr() == fact.value.ptr();
  }

  static bool stands(const Fact& fact, const Subject& subject) {
    PyObject* const owner = fact.owner.is_none() ? subject.owner : fact.owner.ptr();
    if (owner == nullptr) return false;
    switch (fact.kind) {
      case Kind::kItem: return same(item_of(dict_of_fact(fact, subject), fact.key.ptr()), fact.value.ptr());
      case Kind::kItemType: {
        PyObject* const found = item_of(dict_of_fact(fact, subject), fact.key.ptr());
        return found != nullptr && reinterpret_cast<PyObject*>(Py_TYPE(found)) == fact.value.ptr();
      }
      case Kind::kEmpty:
      case Kind::kFilled: {
        PyObject* const found = item_of(dict_of_fact(fact, subject), fact.key.ptr());
        return found != nullptr && PyDict_Check(found) && (PyDict_Size(found) != 0) == (fact.kind == Kind::kFilled);
      }
      case Kind::kContents:
      case Kind::kKinds: {
        PyObject* const dict = dict_of_fact(fact, subject);
        if (dict == nullptr || PyDict_Size(dict) != PyTuple_GET_SIZE(fact.key.ptr())) return false;
        Py_ssize_t at = 0, i = 0;
        PyObject *key, *value;
        while (PyDict_Next(dict, &at, &key, &value)) {
          PyObject* const expected = PyTuple_GET_ITEM(fact.value.ptr(), i);
          if (!same(key, PyTuple_GET_ITEM(fact.key.ptr(), i++))) return false;
          const bool as_was = fact.kind == Kind::kKinds ? reinterpret_cast<PyObject*>(Py_TYPE(value)) == expected
                                                        : same(value, expected);
          if (!as_was) return false;
        }
        return true;
      }
      case Kind::kElements: {
        const Py_ssize_t size = PyList_GET_SIZE(owner);
        if (size != PyTuple_GET_SIZE(fact.value.ptr())) return false;
        for (Py_ssize_t i = 0; i < size; ++i) {
          if (!same(PyList_GET_ITEM(owner, i), PyTuple_GET_ITEM(fact.value.ptr(), i))) return false;
        }
        return true;
      }
      case Kind::kMembers: {
        const int equal = PyObject_RichCompareBool(owner, fact.value.ptr(), Py_EQ);
        if (equal < 0) PyErr_Clear();
        return equal == 1;
      }
      case Kind::kType: return reinterpret_cast<PyObject*>(Py_TYPE(owner)) == fact.value.ptr();
      case Kind::kDictOf:
        return is(pybind11::reinterpret_steal<pybind11::object>(PyObject_GenericGetDict(owner, nullptr)), fact);
      case Kind::kClassItem:
        return _PyType_Lookup(reinterpret_cast<PyTypeObject*>(owner), fact.key.ptr()) == fact.value.ptr();
      case Kind::kFunction: {
        const auto or_none = [](PyObject* object) { return object == nullptr ? Py_None : object; };
        return PyFunction_GET_CODE(owner) == fact.key.ptr() &&
               or_none(PyFunction_GET_DEFAULTS(owner)) == PyTuple_GET_ITEM(fact.value.ptr(), 0) &&
               or_none(PyFunction_GET_KW_DEFAULTS(owner)) == PyTuple_GET_ITEM(fact.value.ptr(), 1);
      }
      case Kind::kCell: return PyCell_GET(owner) != nullptr && same(PyCell_GET(owner), fact.value.ptr());
      case Kind::kAttribute:
        return is(pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(owner, fact.key.ptr())), fact);
    }
    return false;
  }

  std::vector<Fact> facts_;
  std::vector<Seen> seen_;
  std::vector<size_t> elsewhere_;  // facts without a version
  bool remembered_ = false;
};

}  // namespace convext
