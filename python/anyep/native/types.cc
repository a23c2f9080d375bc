// View (TensorView), OwnedRows, Memory, and the element types by name.
#include <anyep/error.h>
#include <anyep/types.h>
#include <nanobind/ndarray.h>

#include <optional>
#include <string>

#include "dlpack.h"
#include "native.h"

namespace anyep::python {
namespace {

constexpr DType kLastDType = DType::kF64;

Extents extents_of(nb::handle sequence) {
  const std::size_t dims = nb::len(sequence);
  if (dims == 0 || dims > Extents::kMaxDims) {
    throw nb::value_error("a tensor of 1 to 4 dimensions is needed");
  }
  Extents extents;
  for (std::size_t dim = 0; dim < dims; ++dim) extents.at[dim] = nb::cast<std::int64_t>(sequence[dim]);
  extents.dims = static_cast<int>(dims);
  return extents;
}

/// Strides in elements, or None for row-major without gaps.
void make_view(TensorView* self, std::uintptr_t address, int dtype, nb::handle shape, nb::handle strides) {
  const TensorView dense =
      TensorView::dense(reinterpret_cast<const void*>(address), static_cast<DType>(dtype), extents_of(shape));
  new (self) TensorView(dense);
  if (!strides.is_none()) self->strides = extents_of(strides);
}

/// A view of an array that nanobind understands (numpy, buffer protocol, DLPack). `dtype` >= 0 gives the elements another
/// name of the same size. The caller keeps the array alive.
template <class Array>
TensorView view_of(const Array& array, int dtype, int device) {
  if (device < 0 && array.device_type() != nb::device::cpu::value) {
    throw nb::value_error("a tensor in the memory of the CPU is needed; this one is on another device");
  }
  if (device >= 0 && (array.device_type() != nb::device::cuda::value || array.device_id() != device)) {
    throw nb::value_error("a tensor on the engine's GPU is needed; this one is on another device");
  }
  TensorView view;
  view.data = const_cast<void*>(static_cast<const void*>(array.data()));
  const nb::dlpack::dtype type = array.dtype();
  const std::optional<DType> own = dtype_of_dlpack(type.code, type.bits, type.lanes);
  if (dtype < 0 && !own) throw nb::type_error("its element type is none of anyep's; name one with anyep.Typed");
  view.dtype = dtype < 0 ? *own : static_cast<DType>(dtype);
  if (size_of(view.dtype) * 8 != static_cast<std::size_t>(array.dtype().bits) * array.dtype().lanes) {
    throw nb::type_error("the named element type has another size than the array's elements");
  }
  if (array.ndim() == 0 || array.ndim() > Extents::kMaxDims) {
    throw nb::value_error("a tensor of 1 to 4 dimensions is needed");
  }
  view.shape.dims = view.strides.dims = static_cast<int>(array.ndim());
  for (int dim = 0; dim < view.shape.dims; ++dim) {
    view.shape[dim] = static_cast<std::int64_t>(array.shape(static_cast<std::size_t>(dim)));
    view.strides[dim] = array.stride(static_cast<std::size_t>(dim));
  }
  return view;
}

nb::tuple tuple_of(const Extents& extents) {
  PyObject* const values = PyTuple_New(extents.dims);
  if (values == nullptr) throw nb::python_error();
  for (int dim = 0; dim < extents.dims; ++dim) PyTuple_SET_ITEM(values, dim, PyLong_FromLongLong(extents[dim]));
  return nb::steal<nb::tuple>(values);
}

int memory_buffer(PyObject* self, Py_buffer* buffer, int flags) {
  const Memory* memory = nb::inst_ptr<Memory>(self);
  return PyBuffer_FillInfo(buffer, self, memory->data, static_cast<Py_ssize_t>(memory->bytes), 0, flags);
}

PyType_Slot memory_slots[] = {{Py_bf_getbuffer, reinterpret_cast<void*>(memory_buffer)}, {0, nullptr}};

}  // namespace

std::optional<DType> dtype_of_dlpack(int code, int bits, int lanes) {
  constexpr int kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kBool = 6, kFloat8E4M3FN = 10;
  if (lanes != 1) return std::nullopt;
  switch (code * 256 + bits) {
    case kBool * 256 + 8:
      return DType::kBool;
    case kUInt * 256 + 8:
      return DType::kU8;
    case kInt * 256 + 8:
      return DType::kI8;
    case kInt * 256 + 16:
      return DType::kI16;
    case kInt * 256 + 32:
      return DType::kI32;
    case kInt * 256 + 64:
      return DType::kI64;
    case kFloat8E4M3FN * 256 + 8:
      return DType::kF8E4M3;
    case kBFloat * 256 + 16:
      return DType::kBF16;
    case kFloat * 256 + 16:
      return DType::kF16;
    case kFloat * 256 + 32:
      return DType::kF32;
    case kFloat * 256 + 64:
      return DType::kF64;
    default:
      return std::nullopt;
  }
}

void bind_types(nb::module_& module) {
  nb::dict dtypes;
  for (int code = 0; code <= static_cast<int>(kLastDType); ++code) {
    dtypes[name_of(static_cast<DType>(code))] = nb::make_tuple(code, size_of(static_cast<DType>(code)));
  }
  module.attr("DTYPES") = dtypes;  // name -> (code, bytes)

  nb::class_<TensorView>(module, "View", "Memory, element type, shape and strides of one tensor; owns nothing.")
      .def("__init__", &make_view, nb::arg("address"), nb::arg("dtype"), nb::arg("shape"),
           nb::arg("strides").none() = nb::none())
      .def_prop_ro("address", [](const TensorView& view) { return reinterpret_cast<std::uintptr_t>(view.data); })
      .def_prop_ro("dtype", [](const TensorView& view) { return name_of(view.dtype); })
      .def_prop_ro("shape", [](const TensorView& view) { return tuple_of(view.shape); })
      .def_prop_ro("strides", [](const TensorView& view) { return tuple_of(view.strides); });

  module.def(
      "view_of", [](const nb::ndarray<>& array, int dtype, int device) { return view_of(array, dtype, device); },
      nb::arg("array").noconvert(), nb::arg("dtype") = -1, nb::arg("device") = -1);
  module.def(
      "view_of", [](const nb::ndarray<nb::ro>& array, int dtype, int device) { return view_of(array, dtype, device); },
      nb::arg("array").noconvert(), nb::arg("dtype") = -1, nb::arg("device") = -1, "Read-only arrays serve as inputs.");

  nb::class_<Memory>(module, "Memory", nb::type_slots(memory_slots),
                     "Bytes of an engine or of a large output, through the buffer protocol; keeps them mapped.")
      .def_prop_ro("address", [](const Memory& memory) { return reinterpret_cast<std::uintptr_t>(memory.data); })
      .def_ro("bytes", &Memory::bytes);

  nb::class_<OwnedRows>(module, "OwnedRows").def_prop_ro("num_rows", &OwnedRows::num_rows);
  // Each Memory shares the rows, which go back to the window's heap when the last one is gone.
  module.def("memories_of", [](OwnedRows& owned) {
    auto rows = std::make_shared<OwnedRows>(std::move(owned));
    const auto memory_of = [&](const TensorView& view) -> nb::object {
      if (!view.given()) return nb::none();
      return nb::cast(Memory{rows, view.data, static_cast<std::size_t>(view.num_elements()) * size_of(view.dtype)});
    };
    return nb::make_tuple(memory_of(rows->view().x), memory_of(rows->view().scales));
  });
}

}  // namespace anyep::python
