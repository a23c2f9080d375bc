// Tensors as views, in every call several times: those of torch are read by the function that torch offers to C callers, all
// other arrays, and whatever is wrong, by arrays.py. And the other way about: memory of this library as torch's tensors.
#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "dlpack.h"
#include "native.h"

namespace anyep::python {
namespace {

/// Set once; what they show lives as long as the process.
PyObject* any_view = nullptr;          // arrays.py's: (op, name, array, device) -> View
PyTypeObject* tensor_type = nullptr;   // torch.Tensor itself; subclasses may have no memory
PyObject* from_dlpack = nullptr;       // torch's: a capsule -> Tensor
const DLExchange* exchange = nullptr;  // torch's functions for C callers; null: it has none

/// False: arrays.py knows better, or says what is wrong.
bool read(PyObject* array, int device, TensorView& view) {
  if (Py_TYPE(array) != tensor_type || exchange == nullptr || exchange->tensor_from_object == nullptr) return false;
  DLTensor tensor;
  if (exchange->tensor_from_object(array, &tensor) != 0) {
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

/// What another library's tensor shows. Base: DLManagedTensor or DLVersionedTensor.
template <class Base>
struct Managed {
  Base base{};
  Extents shape, strides;
  std::shared_ptr<const void> owner;
};

void set_type(DLTensor& tensor, DType dtype) {
  constexpr std::uint8_t kInt = 0, kUInt = 1;
  const bool is_signed = dtype == DType::kI8 || dtype == DType::kI16 || dtype == DType::kI32 || dtype == DType::kI64;
  tensor.code = is_signed ? kInt : kUInt;  // other types travel as bits: the caller names them
  tensor.bits = static_cast<std::uint8_t>(8 * size_of(dtype));
  tensor.lanes = 1;
}

/// Its deleter frees it.
template <class Base>
Base* managed_of(const TensorView& view, int device, std::shared_ptr<const void> owner) {
  auto managed = std::make_unique<Managed<Base>>();
  managed->shape = view.shape;
  managed->strides = view.strides;
  managed->owner = std::move(owner);
  DLTensor& tensor = managed->base.tensor;
  tensor.data = view.data;
  tensor.device_type = device < 0 ? kDLCpu : kDLCuda;
  tensor.device_id = std::max(device, 0);
  tensor.ndim = view.shape.dims;
  set_type(tensor, view.dtype);
  tensor.shape = managed->shape.at.data();
  tensor.strides = managed->strides.at.data();
  managed->base.context = managed.get();
  managed->base.deleter = [](Base* self) { delete static_cast<Managed<Base>*>(self->context); };
  return &managed.release()->base;
}

constexpr const char* kFresh = "dltensor";  // renamed by who takes the tensor over

void free_unused(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, kFresh)) return;
  auto* const managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, kFresh));
  managed->deleter(managed);
}

}  // namespace

nb::object tensor_of(const TensorView& view, int device, std::shared_ptr<const void> owner) {
  if (exchange != nullptr && exchange->object_from_managed != nullptr) {
    auto* const managed = managed_of<DLVersionedTensor>(view, device, std::move(owner));
    managed->version = {1, 0};
    void* made = nullptr;
    if (exchange->object_from_managed(managed, &made) != 0) throw nb::python_error();
    return nb::steal(static_cast<PyObject*>(made));
  }
  auto* const managed = managed_of<DLManagedTensor>(view, device, std::move(owner));
  PyObject* const capsule = PyCapsule_New(managed, kFresh, free_unused);
  if (capsule == nullptr) {
    managed->deleter(managed);
    throw nb::python_error();
  }
  return nb::handle(from_dlpack)(nb::steal(capsule));
}

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
      "use_torch",
      [](nb::handle type, nb::handle capsule, nb::handle function) {
        exchange = exchange_of(capsule);
        tensor_type = reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr());
        from_dlpack = function.inc_ref().ptr();
      },
      nb::arg("type"), nb::arg("exchange").none(), nb::arg("from_dlpack"),
      "From now on view() itself reads tensors of exactly this type, and tensor_of() makes such: by its C functions, "
      "where it has them, else by from_dlpack.");
  module.def(
      "tensor_of",
      [](const TensorView& shown, int device, const Memory* memory) {
        return tensor_of(shown, device, memory != nullptr ? memory->owner : nullptr);
      },
      nb::arg("view"), nb::arg("device"), nb::arg("memory").none() = nb::none(),
      "torch's tensor over a device's memory (-1 = the CPU), which keeps what `memory` keeps. Integers of the "
      "elements' size.");
  module.def(
      "view", &view, nb::arg("op"), nb::arg("name"), nb::arg("array").none(), nb::arg("device") = -1,
      "The memory of an array. TypeError: not an array; ArgumentError: not on `device`, an element type that anyep "
      "lacks, not 1 to 4 dimensions. The caller keeps the array alive.");
  module.def("optional_view", &optional_view, nb::arg("op"), nb::arg("name"), nb::arg("array").none(),
             nb::arg("device") = -1, "The same; None for None.");
}

}  // namespace anyep::python
