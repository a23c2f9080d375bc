// What the files of the extension share. Each binds one public header; module.cc calls them in the order of dependence.
// Python hands over addresses, shapes and strides (View); libraries of arrays appear in the .py files only.
#pragma once

#include <anyep/config.h>
#include <anyep/types.h>
#include <nanobind/nanobind.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace anyep::python {

namespace nb = nanobind;

void bind_error(nb::module_& module);
void bind_types(nb::module_& module);
void bind_config(nb::module_& module);
void bind_bootstrap(nb::module_& module);
void bind_plan(nb::module_& module);
void bind_recycle(nb::module_& module);
void bind_event(nb::module_& module);
void bind_handle(nb::module_& module);
void bind_engine(nb::module_& module);
void bind_workload(nb::module_& module);

/// Memory of an engine, or of a large output, that Python sees through the buffer protocol; `owner` keeps it mapped.
struct Memory {
  std::shared_ptr<const void> owner;
  void* data = nullptr;
  std::size_t bytes = 0;
};

/// An argument that may be None.
inline TensorView view_or_none(const TensorView* view) {
  return view != nullptr ? *view : TensorView{};
}

/// seconds <= 0 or None: the engine's own limit.
Options make_options(double timeout_s, int num_sms, std::vector<Event> after, bool wait);

/// For calls that may wait: other Python threads run meanwhile.
using WithoutGil = nb::call_guard<nb::gil_scoped_release>;

}  // namespace anyep::python
