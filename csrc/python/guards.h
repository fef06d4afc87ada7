// Guards: what a plan was made from, checked before each of its calls. A swapped network relies on hundreds of facts
// about Python objects (which tensors its layers hold, their settings, hooks, training flags, what globals and classes
// say), and asking for each from Python, with caches cold after every layer, took longer than some of the layers.
//
// Most facts are about dictionaries. What was in one is in it still where CPython tells of no change since: before
// 3.12 a dictionary has another version after each change (PEP 509), from 3.12 on it calls those that watch it
// (dict_watcher.h). So most calls read a line of memory for each dictionary, or nothing at all, instead of its keys and
// entries, which a network's weights have driven out of the caches since the last call. Where one has changed, the
// facts about that one are looked at. Classes have a version in every release: it is new after each change of the class
// or of one of its bases.
#pragma once
#include <pybind11/pybind11.h>

#include <cstring>
#include <set>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "dict_watcher.h"

namespace convext {

// Facts are added once and checked together. All objects involved are kept alive; what is compared by identity may
// therefore not be another object at the same address. One object is not kept: the owner, which holds the plan that
// holds the guards. It is given to `holds`, and facts about it are added with None in its place, or in that of its
// dictionary.
class Guards : DictListener {
 public:
  Guards() = default;
  Guards(const Guards&) = delete;
  Guards& operator=(const Guards&) = delete;
  ~Guards() { forget(); }

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
    if (remembered_) {
      const News news = changes(subject);
      if (news == News::kBroken) return false;
      if (news == News::kNone) {
        for (size_t k = 0; k < elsewhere_.size(); ++k) {  // they may run code that comes here again
          if (!stands(facts_[elsewhere_[k]], subject)) return false;
        }
        return true;
      }
    }
    forget();
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
    forget();
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

  // A dictionary or class that facts are about, as it was when all of them last stood. Dictionaries are in the order of
  // the facts: one that is an item of another stands behind that, and is there as long as that is as it was.
  struct Seen {
    PyObject* object;  // null: a dictionary that is gone
    uint64_t version;
    bool nests;                 // whether another dictionary that facts are about is an item of this one
    bool changed;               // and is listed in changed_
    std::vector<size_t> facts;  // those about it
  };
  // Since all facts last stood, there is nothing new among dictionaries and classes; one of the facts about them does
  // not stand; or all must be looked at.
  enum class News { kNone, kBroken, kMuch };

  static pybind11::object dictionary(pybind11::object dict) {
    if (!dict.is_none() && !PyDict_Check(dict.ptr())) {
      throw pybind11::type_error("expected a dict, or None for the owner's");
    }
    return dict;
  }

  void add(Fact fact) {
    forget();
    facts_.push_back(std::move(fact));
  }

  static bool about_dict(Kind kind) { return kind <= Kind::kFilled; }

  static uint64_t class_version(PyObject* type) {
    auto* const kind = reinterpret_cast<PyTypeObject*>(type);
#if PY_VERSION_HEX < 0x030D0000  // later a class without a version has the version 0
    if (!PyType_HasFeature(kind, Py_TPFLAGS_VALID_VERSION_TAG)) return 0;
#endif
    return kind->tp_version_tag;
  }

#if PY_VERSION_HEX < 0x030C0000
  static uint64_t dict_version(PyObject* dict) { return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag; }
#else
  static uint64_t dict_version(PyObject*) { return 0; }
#endif

  News changes(const Subject& subject) {
    if (owned_ != kNone && dicts_[owned_].object != subject.dict) return News::kMuch;
    for (Seen& seen : classes_) {
      if (class_version(seen.object) == seen.version) continue;
      if (!all_stand(seen.facts, subject)) return News::kBroken;
      seen.version = class_version(seen.object);  // the look at it has given it one
      if (seen.version == 0) return News::kMuch;
    }
    if constexpr (!DictWatcher::kNeeded) {
      for (Seen& seen : dicts_) {
        const uint64_t version = dict_version(seen.object);
        if (version == seen.version) continue;
        if (seen.nests) return News::kMuch;
        if (!all_stand(seen.facts, subject)) return News::kBroken;
        seen.version = version;
      }
    }
    while (!changed_.empty()) {
      // Taken from the list first: what is looked at may run code that changes it again.
      const size_t i = changed_.back();
      changed_.pop_back();
      dicts_[i].changed = false;
      if (dicts_[i].object == nullptr || dicts_[i].nests) return News::kMuch;
      if (all_stand(dicts_[i].facts, subject)) continue;
      dict_changed(i, false);
      return News::kBroken;
    }
    return News::kNone;
  }

  bool all_stand(const std::vector<size_t>& facts, const Subject& subject) const {
    for (const size_t i : facts) {
      if (!stands(facts_[i], subject)) return false;
    }
    return true;
  }

  // From the watcher, before the change. It must not throw: there is room for all in changed_.
  void dict_changed(size_t index, bool gone) noexcept override {
    Seen& seen = dicts_[index];
    if (gone) seen.object = nullptr;
    if (seen.changed) return;
    seen.changed = true;
    changed_.push_back(index);
  }

  // Called where every fact stands. Facts about what has no version and cannot be watched are checked in every call.
  void remember(const Subject& subject) {
    const auto tells = [](PyObject* dict) {
      return !DictWatcher::kNeeded || (DictWatcher::instance().works() && DictWatcher::tells(dict));
    };
    std::unordered_map<PyObject*, size_t> dicts, classes;
    std::set<std::tuple<Kind, PyObject*, PyObject*>> listed;
    const auto note = [](std::vector<Seen>& all, std::unordered_map<PyObject*, size_t>& places, PyObject* object,
                         uint64_t version, size_t fact) {
      const auto [place, is_new] = places.emplace(object, all.size());
      if (is_new) all.push_back({object, version, false, false, {}});
      all[place->second].facts.push_back(fact);
      return place->second;
    };
    for (size_t i = 0; i < facts_.size(); ++i) {
      const Fact& fact = facts_[i];
      PyObject* const owner = fact.owner.ptr();
      PyObject* const dict = about_dict(fact.kind) ? dict_of_fact(fact, subject) : nullptr;
      const bool nests = fact.kind == Kind::kEmpty || fact.kind == Kind::kFilled;
      PyObject* const inner = nests ? item_of(dict, fact.key.ptr()) : nullptr;
      if (dict != nullptr && tells(dict) && (!nests || tells(inner))) {
        const size_t place = note(dicts_, dicts, dict, dict_version(dict), i);
        if (owner == Py_None) owned_ = place;
        if (nests) {
          note(dicts_, dicts, inner, dict_version(inner), i);
          dicts_[place].nests = true;
        }
      } else if (fact.kind == Kind::kClassItem && class_version(owner) != 0) {
        note(classes_, classes, owner, class_version(owner), i);
      } else if (about_dict(fact.kind) || listed.emplace(fact.kind, owner, fact.key.ptr()).second) {
        elsewhere_.push_back(i);
      }
    }
    if constexpr (DictWatcher::kNeeded) {
      changed_.reserve(dicts_.size());
      for (size_t i = 0; i < dicts_.size(); ++i) DictWatcher::instance().listen(dicts_[i].object, *this, i);
    }
    remembered_ = true;
  }

  // The opposite.
  void forget() {
    if constexpr (DictWatcher::kNeeded) {
      for (const Seen& seen : dicts_) {
        if (seen.object != nullptr) DictWatcher::instance().leave(seen.object, *this);
      }
    }
    dicts_.clear();
    classes_.clear();
    changed_.clear();
    elsewhere_.clear();
    owned_ = kNone;
    remembered_ = false;
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
      case Kind::kDictOf: {
        PyObject** const place = _PyObject_GetDictPtr(owner);  // PyObject_GenericGetDict without its reference
        return place != nullptr && *place == fact.value.ptr();
      }
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

  static constexpr size_t kNone = ~size_t{0};

  std::vector<Fact> facts_;
  std::vector<Seen> dicts_, classes_;
  std::vector<size_t> changed_;    // dictionaries that have changed since, where they are watched
  std::vector<size_t> elsewhere_;  // facts about neither
  size_t owned_ = kNone;           // the owner's dictionary among dicts_
  bool remembered_ = false;        // whether the former say how it was when all facts stood
};

}  // namespace convext
