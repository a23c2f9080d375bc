// anyep._native: the C++ interface, header by header. Importing it starts nothing and touches no device.
#include "native.h"

NB_MODULE(_native, module) {
  using namespace anyep::python;
  module.doc() = "The C++ interface of AnyEP. Use the anyep package; this module has no stable names.";
  // Tensors of the user that are alive when the interpreter ends are no leak of ours; the tests count what is left behind.
  nb::set_leak_warnings(false);
  bind_error(module);
  bind_types(module);
  bind_arrays(module);
  bind_config(module);
  bind_bootstrap(module);
  bind_plan(module);
  bind_recycle(module);
  bind_event(module);
  bind_handle(module);
  bind_shown(module);
  bind_engine(module);
  bind_device(module);
  bind_workload(module);
}
