// Tensors as views, in every call several times: those of torch are read by the function that torch offers to C callers, all
// other arrays, and whatever is wrong, by arrays.py.
#include <cstring>

#include "dlpack.h"
#include "native.h"

namespace anyep::python {
namespace {

/// Both are set once and live as long as the process.
PyObject* any_view = nullptr;         // arrays.py's: (op, name, array, device) -> View
PyTypeObject* tensor_type = nullptr;  // torch.Tensor itself; subclasses may have no memory
decltype(DLExchange::tensor_from_object) read_tensor = nullptr;

/// False: arrays.py knows better, or says what is wrong.
bool read(PyObject* array, int device, TensorView& view) {
  if (Py_TYPE(array) != tensor_type || read_tensor == nullptr) return false;
  DLTensor tensor;
  if (read_tensor(array, &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  const bool here =
      device < 0 ? tensor.device_type == kDLCpu : tensor.device_type == kDLCuda && tensor.device_id == device;
  if (!here || tensor.ndim < 1 || tensor.ndim > Extents::kMaxDims || tensor.strides == nullptr) return false;
  const std::optional<DType> dtype = dtype_of_dlpack(tensor.code, tensor.bits, tensor.lanes);
  if (!dtype) return false;
  view.data = static_cast<std::byte*>(tensor.data) + tensor.byte_offset;
  view.dtype = *dtype;
  view.shape.dims = view.strides.dims = tensor.ndim;
  for (int dim = 0; dim < tensor.ndim; ++dim) {
    view.shape[dim] = tensor.shape[dim];
    view.strides[dim] = tensor.strides[dim];
  }
  return true;
}

nb::object view(nb::handle op, nb::handle name, nb::handle array, int device) {
  TensorView shown;
  if (read(array.ptr(), device, shown)) return nb::cast(shown);
  return nb::handle(any_view)(op, name, array, device);
}

nb::object optional_view(nb::handle op, nb::handle name, nb::handle array, int device) {
  return array.is_none() ? nb::none() : view(op, name, array, device);
}

/// The table of version 1, the first with this layout, of a chain that begins with the latest; null: there is none.
const DLExchange* exchange_of(nb::handle capsule) {
  constexpr const char* kName = "dlpack_exchange_api";
  if (!PyCapsule_IsValid(capsule.ptr(), kName)) return nullptr;
  const auto* table = static_cast<const DLExchange*>(PyCapsule_GetPointer(capsule.ptr(), kName));
  while (table != nullptr && table->version.major != 1) table = table->previous;
  return table;
}

}  // namespace

TensorView ArrayReader::operator()(const char* name, nb::handle array) const {
  TensorView shown;
  if (read(array.ptr(), device_, shown)) return shown;
  if (nb::isinstance<TensorView>(array)) return *nb::inst_ptr<TensorView>(array);
  const nb::object view = nb::handle(any_view)(op_, name, array, device_);
  return nb::cast<TensorView>(view);
}

std::vector<TensorView> ArrayReader::all(const char* name, nb::handle arrays) const {
  std::vector<TensorView> views;
  for (const nb::handle array : arrays) views.push_back((*this)(name, array));
  return views;
}

void bind_arrays(nb::module_& module) {
  module.def(
      "read_others", [](nb::handle function) { any_view = function.inc_ref().ptr(); }, nb::arg("function"),
      "What makes views of all that view() does not read itself.");
  module.def(
      "read_torch",
      [](nb::handle type, nb::handle capsule) {
        const DLExchange* const exchange = exchange_of(capsule);
        if (exchange == nullptr) return;
        read_tensor = exchange->tensor_from_object;
        tensor_type = reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr());
      },
      nb::arg("type"), nb::arg("exchange").none(),
      "From now on view() reads tensors of exactly this type, where it has such functions.");
  module.def(
      "view", &view, nb::arg("op"), nb::arg("name"), nb::arg("array").none(), nb::arg("device") = -1,
      "The memory of an array. TypeError: not an array; ArgumentError: not on `device`, an element type that anyep "
      "lacks, not 1 to 4 dimensions. The caller keeps the array alive.");
  module.def("optional_view", &optional_view, nb::arg("op"), nb::arg("name"), nb::arg("array").none(),
             nb::arg("device") = -1, "The same; None for None.");
}

}  // namespace anyep::python
