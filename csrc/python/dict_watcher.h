// Who is to be told of changes of dictionaries. CPython 3.12 has taken the versions of dictionaries away and calls
// watchers instead, before each change of a dictionary that they watch and before its end (PyDict_Watch). There are
// eight watchers in a process, so all of convext is one.
#pragma once
#include <pybind11/pybind11.h>

#include <cstddef>
#include <unordered_map>
#include <vector>

namespace convext {

class DictListener {
 public:
  // Before the dictionary that it has listened to under this number changes, or is gone. Only notes may be taken: the
  // change is not made yet, and no Python code may run.
  virtual void dict_changed(size_t number, bool gone) noexcept = 0;

 protected:
  ~DictListener() = default;
};

// Under the GIL, which the library needs and free-threaded builds of CPython therefore switch on.
class DictWatcher {
 public:
#if PY_VERSION_HEX < 0x030C0000
  static constexpr bool kNeeded = false;
#else
  static constexpr bool kNeeded = true;
#endif

  static DictWatcher& instance() {
    static auto* const watcher = new DictWatcher;  // never deleted: dictionaries end later than static objects
    return *watcher;
  }

  // Whether CPython had a watcher left.
  bool works() const { return id_ >= 0; }

  // Whether changes of a dictionary are told. CPython 3.13 keeps the values of an object in the object as long as its
  // attributes are those of its class's other objects; its dictionary then points there, and CPython 3.13.0 writes an
  // attribute there and tells nobody. So the dictionary is made one that holds its values itself, as it does by itself
  // with an unusual attribute: popitem does, and the item comes back as the last, as which it went.
  static bool tells(PyObject* dict) {
#if PY_VERSION_HEX >= 0x030D0000
    auto* const fields = reinterpret_cast<PyDictObject*>(dict);
    if (fields->ma_values == nullptr) return true;
    if (fields->ma_used == 0) return false;
    const auto last = pybind11::reinterpret_steal<pybind11::object>(
        PyObject_CallMethod(reinterpret_cast<PyObject*>(&PyDict_Type), "popitem", "O", dict));
    if (!last || PyDict_SetItem(dict, PyTuple_GET_ITEM(last.ptr(), 0), PyTuple_GET_ITEM(last.ptr(), 1)) < 0) {
      throw pybind11::error_already_set();
    }
    return fields->ma_values == nullptr;
#else
    return PyDict_Check(dict);
#endif
  }

  // A listener listens to a dictionary once. It must be one that tells.
  void listen(PyObject* dict, DictListener& listener, size_t number) {
    auto& all = listeners_[dict];
    if (all.empty()) watch(dict);
    all.push_back({&listener, number});
  }

  void leave(PyObject* dict, const DictListener& listener) {
    const auto found = listeners_.find(dict);
    if (found == listeners_.end()) return;
    auto& all = found->second;
    for (size_t i = 0; i < all.size(); ++i) {
      if (all[i].who != &listener) continue;
      all[i] = all.back();
      all.pop_back();
      break;
    }
    if (!all.empty()) return;
    listeners_.erase(found);
    unwatch(dict);
  }

 private:
  struct Listener {
    DictListener* who;
    size_t number;
  };

#if PY_VERSION_HEX < 0x030C0000
  void watch(PyObject*) {}
  void unwatch(PyObject*) {}
#else
  DictWatcher() : id_(PyDict_AddWatcher(on_event)) {
    if (id_ < 0) PyErr_Clear();
  }
  void watch(PyObject* dict) {
    if (PyDict_Watch(id_, dict) < 0) throw pybind11::error_already_set();
  }
  void unwatch(PyObject* dict) {
    if (PyDict_Unwatch(id_, dict) < 0) PyErr_Clear();
  }
  static int on_event(PyDict_WatchEvent event, PyObject* dict, PyObject*, PyObject*) {
    auto& listeners = instance().listeners_;
    const auto found = listeners.find(dict);
    if (found == listeners.end()) return 0;
    const bool gone = event == PyDict_EVENT_DEALLOCATED;
    for (const Listener& listener : found->second) listener.who->dict_changed(listener.number, gone);
    if (gone) listeners.erase(found);
    return 0;
  }
#endif

  int id_ = -1;
  std::unordered_map<PyObject*, std::vector<Listener>> listeners_;
};

}  // namespace convext
