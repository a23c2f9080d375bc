// What the files of the extension share. Each binds one public header; module.cc calls them in the order of dependence.
// Python hands over addresses, shapes and strides (View); libraries of arrays appear in the .py files only.
#pragma once

#include <anyep/config.h>
#include <anyep/handle.h>
#include <anyep/types.h>
#include <nanobind/nanobind.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace anyep::python {

namespace nb = nanobind;

void bind_error(nb::module_& module);
void bind_types(nb::module_& module);
void bind_arrays(nb::module_& module);
void bind_config(nb::module_& module);
void bind_bootstrap(nb::module_& module);
void bind_plan(nb::module_& module);
void bind_recycle(nb::module_& module);
void bind_event(nb::module_& module);
void bind_handle(nb::module_& module);
void bind_shown(nb::module_& module);
void bind_engine(nb::module_& module);
void bind_device(nb::module_& module);
void bind_workload(nb::module_& module);

/// Memory of an engine, or of a large output, that Python sees through the buffer protocol; `owner` keeps it mapped.
struct Memory {
  std::shared_ptr<const void> owner;
  void* data = nullptr;
  std::size_t bytes = 0;
};

/// A handle and tensors that show its arrays (take_v1) share it: whichever of them goes last frees it.
struct SharedHandle {
  explicit SharedHandle(Handle handle) : state(std::make_shared<const Handle>(std::move(handle))) {}
  const Handle& operator*() const { return *state; }
  const Handle* operator->() const { return state.get(); }
  std::shared_ptr<const Handle> state;
};

/// Reads the arguments of one call that are arrays; a View is taken as it is.
class ArrayReader {
 public:
  /// `op`: what messages begin with. `device`: where arrays must lie, -1 = memory of the CPU.
  ArrayReader(const char* op, int device) : op_(op), device_(device) {}
  /// @throws what arrays.py's view() raises.
  TensorView operator()(const char* name, nb::handle array) const;
  TensorView optional(const char* name, nb::handle array) const {
    return array.is_none() ? TensorView{} : (*this)(name, array);
  }
  std::vector<TensorView> all(const char* name, nb::handle arrays) const;

 private:
  const char* op_;
  int device_;
};

/// Streams come as numbers, those of torch: 0 is the legacy default stream, which the C++ interface of CPU ranks knows as
/// "none" and the CUDA runtime by this handle as well.
inline StreamRef stream_ref(std::uintptr_t stream) {
  constexpr std::uintptr_t kLegacyStream = 1;
  return {reinterpret_cast<void*>(stream != 0 ? stream : kLegacyStream)};
}

/// torch's tensor over memory of `device` (-1 = the CPU), which keeps `owner`.
nb::object tensor_of(const TensorView& view, int device, std::shared_ptr<const void> owner);

/// seconds <= 0 or None: the engine's own limit.
Options make_options(double timeout_s, int num_sms, std::vector<Event> after, bool wait);

/// For calls that may wait: other Python threads run meanwhile.
using WithoutGil = nb::call_guard<nb::gil_scoped_release>;

}  // namespace anyep::python
