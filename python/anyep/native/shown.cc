// Which handle a caller's tensors were made of: for callers whose handles are tensors, and come back as the same objects.
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "native.h"

namespace anyep::python {
namespace {

/// The object, or null when it is gone. Whoever asks holds the object that it compares with.
PyObject* referent(nb::handle reference) {
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* object = nullptr;
  if (PyWeakref_GetRef(reference.ptr(), &object) < 0) throw nb::python_error();
  Py_XDECREF(object);
  return object;
#else
  PyObject* const object = PyWeakref_GetObject(reference.ptr());
  return object == Py_None ? nullptr : object;
#endif
}

nb::object reference_to(PyObject* object, PyObject* when_gone) {
  PyObject* const reference = PyWeakref_NewRef(object, when_gone);
  if (reference == nullptr) throw nb::python_error();
  return nb::steal(reference);
}

/// How often each tensor was changed in place; empty if torch does not count that: of tensors made in inference mode.
std::vector<long> versions_of(nb::tuple tensors) {
  static PyObject* const name = PyUnicode_InternFromString("_version");
  std::vector<long> versions;
  versions.reserve(tensors.size());
  for (const nb::handle tensor : tensors) {
    const nb::object version = nb::steal(PyObject_GetAttr(tensor.ptr(), name));
    if (!version.is_valid()) {
      if (!PyErr_ExceptionMatches(PyExc_RuntimeError)) throw nb::python_error();
      PyErr_Clear();
      return {};
    }
    versions.push_back(PyLong_AsLong(version.ptr()));
  }
  return versions;
}

/// An entry lives as long as its first tensor and keeps no tensor alive.
class ShownHandles {
 public:
  ShownHandles() : entries_(std::make_shared<Entries>()) {
    forget_ = nb::cpp_function([entries = std::weak_ptr<Entries>(entries_)](nb::handle reference) {
      if (const auto alive = entries.lock()) alive->forget(reference.ptr());
    });
  }

  void add(nb::object handle, nb::tuple tensors) {
    Entry entry{std::move(handle), reference_to(tensors[0].ptr(), forget_.ptr()), {}, versions_of(tensors)};
    for (std::size_t at = 1; at < tensors.size(); ++at) {
      entry.others.push_back(reference_to(tensors[at].ptr(), nullptr));
    }
    PyObject* const first = tensors[0].ptr();
    if (const auto known = entries_->of_tensor.find(first); known != entries_->of_tensor.end()) {
      entries_->forget(known->second.first.ptr());
    }
    entries_->tensor_of.emplace(entry.first.ptr(), first);
    entries_->of_tensor.emplace(first, std::move(entry));
  }

  /// None: not known.
  nb::object find(nb::tuple tensors) const {
    const auto found = entries_->of_tensor.find(tensors[0].ptr());
    if (found == entries_->of_tensor.end()) return nb::none();
    const Entry& entry = found->second;
    bool same = referent(entry.first) == tensors[0].ptr() && tensors.size() == entry.others.size() + 1;
    for (std::size_t at = 1; same && at < tensors.size(); ++at) {
      same = referent(entry.others[at - 1]) == tensors[at].ptr();
    }
    return same && versions_of(tensors) == entry.versions ? entry.handle : nb::none();
  }

  std::size_t size() const { return entries_->of_tensor.size(); }

  void clear() {
    const Entries old = std::exchange(*entries_, {});  // what goes with it may come back here
  }

 private:
  struct Entry {
    nb::object handle, first;
    std::vector<nb::object> others;
    std::vector<long> versions;
  };

  struct Entries {
    std::unordered_map<PyObject*, Entry> of_tensor;
    std::unordered_map<PyObject*, PyObject*> tensor_of;  // by reference

    void forget(PyObject* reference) {
      const auto tensor = tensor_of.find(reference);
      if (tensor == tensor_of.end()) return;
      const auto gone = of_tensor.extract(tensor->second);
      tensor_of.erase(tensor);
    }
  };

  std::shared_ptr<Entries> entries_;
  nb::object forget_;
};

}  // namespace

void bind_shown(nb::module_& module) {
  nb::class_<ShownHandles>(
      module, "ShownHandles",
      "Handles of one engine by the torch tensors that were made of them. Tensors that were made, copied or moved "
      "elsewhere are not known, nor are those that were changed in place, as far as torch counts changes.")
      .def(nb::init<>())
      .def("add", &ShownHandles::add, nb::arg("handle"), nb::arg("tensors"))
      .def("find", &ShownHandles::find, nb::arg("tensors"))
      .def("clear", &ShownHandles::clear)
      .def("__len__", &ShownHandles::size);
}

}  // namespace anyep::python
