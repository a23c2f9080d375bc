// anyep::Error becomes the exception class of its code (errors.py), with the same fields.
#include <anyep/error.h>

#include <exception>

#include "native.h"

namespace anyep::python {
namespace {

void raise(const Error& error) {
  nb::dict fields;
  fields["code"] = nb::str(name_of(error.code));
  fields["rank"] = error.rank;
  nb::list peers;
  for (const int peer : error.peers) peers.append(peer);
  fields["peers"] = peers;
  fields["op"] = nb::str(error.op.c_str());
  fields["phase"] = nb::str(error.phase.c_str());
  fields["generation"] = error.generation;
  fields["sequence"] = error.sequence;
  fields["expected"] = error.expected;
  fields["seen"] = error.seen;
  fields["elapsed_s"] = static_cast<double>(error.elapsed_ns) * 1e-9;
  fields["limit_s"] = static_cast<double>(error.limit_ns) * 1e-9;
  fields["argument"] = nb::str(error.argument.c_str());
  fields["got"] = nb::str(error.got.c_str());
  fields["allowed"] = nb::str(error.allowed.c_str());
  fields["need"] = error.need;
  fields["have"] = error.have;
  const nb::object exception = nb::module_::import_("anyep.errors").attr("_from_native")(nb::str(error.what()), fields);
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(exception.ptr())), exception.ptr());
}

}  // namespace

void bind_error(nb::module_& module) {
  nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
    try {
      std::rethrow_exception(thrown);
    } catch (const Error& error) {
      raise(error);
    }
  });
  nb::list codes;
  for (int code = 0; code <= static_cast<int>(ErrorCode::kInternal); ++code) {
    codes.append(nb::str(name_of(static_cast<ErrorCode>(code))));
  }
  module.attr("ERROR_CODES") = codes;
}

}  // namespace anyep::python
