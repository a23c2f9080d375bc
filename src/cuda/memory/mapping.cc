#include "cuda/memory/mapping.h"

#include <utility>

#include "core/check.h"
#include "cuda/runtime/check.h"
#include "cuda/runtime/device_guard.h"
#include "cuda/runtime/driver.h"

namespace anyep::cuda {

Mapping Mapping::reserve(std::uint64_t bytes, std::uint64_t alignment) {
  Mapping mapping;
  const CUresult status = driver().mem_reserve(&mapping.base_, bytes, alignment, 0, 0);
  if (status == CUDA_ERROR_OUT_OF_MEMORY) core::throw_resource("create", "cuMemAddressReserve", 0, bytes);
  check(status, "cuMemAddressReserve");
  mapping.bytes_ = bytes;
  return mapping;
}

Mapping::Mapping(Mapping&& other) noexcept
    : base_(std::exchange(other.base_, 0)),
      bytes_(std::exchange(other.bytes_, 0)),
      pieces_(std::exchange(other.pieces_, {})) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(base_, other.base_);
  std::swap(bytes_, other.bytes_);
  std::swap(pieces_, other.pieces_);
  return *this;
}

Mapping::~Mapping() {
  if (base_ == 0) return;
  const Driver& functions = *find_driver();
  for (const Piece& piece : pieces_) {
    log_failure(functions.mem_unmap(base_ + piece.offset, piece.bytes), "cuMemUnmap");
  }
  log_failure(functions.mem_free(base_, bytes_), "cuMemAddressFree");
}

void Mapping::map(std::uint64_t offset, const PhysicalMemory& memory, std::span<const int> devices) {
  ANYEP_CHECK(offset + memory.bytes() <= bytes_, "a piece lies in the reserved range");
  const OutsideCapture outside;
  const Driver& functions = driver();
  std::vector<CUmemAccessDesc> access(devices.size());
  for (std::size_t index = 0; index < devices.size(); ++index) {
    access[index].location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    access[index].location.id = devices[index];
    access[index].flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  }
  pieces_.reserve(pieces_.size() + 1);
  check_sharing(functions.mem_map(base_ + offset, memory.bytes(), 0, memory.get(), 0), "cuMemMap");
  const CUresult status = functions.mem_set_access(base_ + offset, memory.bytes(), access.data(), access.size());
  if (status != CUDA_SUCCESS) {
    log_failure(functions.mem_unmap(base_ + offset, memory.bytes()), "cuMemUnmap");
    check_sharing(status, "cuMemSetAccess");
  }
  pieces_.push_back({offset, memory.bytes()});
}

}  // namespace anyep::cuda
