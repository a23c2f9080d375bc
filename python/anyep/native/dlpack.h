// DLPack, as its specification lays it out: tensors without and with a version, and the functions of version 1 that a library of
// tensors offers to C callers.
#pragma once

#include <anyep/types.h>

#include <cstdint>
#include <optional>

namespace anyep::python {

constexpr std::int32_t kDLCpu = 1, kDLCuda = 2;

struct DLTensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t ndim;
  std::uint8_t code, bits;
  std::uint16_t lanes;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

struct DLVersion {
  std::uint32_t major, minor;
};

struct DLVersionedTensor {
  DLVersion version;
  void* context;
  void (*deleter)(DLVersionedTensor*);
  std::uint64_t flags;
  DLTensor tensor;
};

/// What the attribute __dlpack_c_exchange_api__ of a tensor type holds. Two of its functions are called here.
struct DLExchange {
  DLVersion version;
  DLExchange* previous;
  void (*allocate)();
  void (*managed_from_object)();
  /// Makes an object of a tensor, which it takes over; 0, or -1 with a Python exception.
  int (*object_from_managed)(DLVersionedTensor* tensor, void** object);
  /// Fills a tensor that borrows from the object; 0, or -1 with a Python exception. May be null.
  int (*tensor_from_object)(void* object, DLTensor* out);
  void (*current_stream)();
};

/// The element type of a DLPack tensor; none where this library has no such type.
std::optional<DType> dtype_of_dlpack(int code, int bits, int lanes);

}  // namespace anyep::python
