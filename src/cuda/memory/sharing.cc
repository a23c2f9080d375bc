#include "cuda/memory/sharing.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <bit>
#include <cstring>

#include "core/check.h"
#include "core/env.h"
#include "cuda/runtime/check.h"

namespace anyep::cuda {
namespace {

constexpr const char* kOp = "create";

const char* variable_of(Wish wish) {
  switch (wish) {
    case Wish::kDescriptors:
      return "ANYEP_CUDA_MEMORY=vmm";
    case Wish::kFabric:
      return "ANYEP_CUDA_MEMORY=fabric";
    case Wish::kIpc:
      return "ANYEP_CUDA_MEMORY=ipc";
    case Wish::kHostMemory:
      return "ANYEP_PEER_ACCESS=0";
    case Wish::kAny:
      break;
  }
  return "no wish";
}

/// The wish of all ranks; those that leave it open follow.
Wish common_wish(std::span<const GpuNote> notes) {
  Wish common = Wish::kAny;
  std::size_t who = 0;
  for (std::size_t rank = 0; rank < notes.size(); ++rank) {
    const Wish wish = notes[rank].wish;
    if (wish == Wish::kAny || wish == common) continue;
    if (common != Wish::kAny) {
      Error error(ErrorCode::kMismatch, fmt::format("{}: rank {} has {}, rank {} has {}. Set the same on all ranks",
                                                    kOp, who, variable_of(common), rank, variable_of(wish)));
      error.op = kOp;
      error.peers = {static_cast<int>(who), static_cast<int>(rank)};
      throw error;
    }
    common = wish;
    who = rank;
  }
  return common;
}

/// First rank that lacks it; -1 = all have it.
int first_without(std::span<const GpuNote> notes, bool GpuNote::*feature) {
  for (std::size_t rank = 0; rank < notes.size(); ++rank) {
    if (!(notes[rank].*feature)) return static_cast<int>(rank);
  }
  return -1;
}

std::string unreachable_pair(std::span<const GpuNote> notes) {
  for (std::size_t rank = 0; rank < notes.size(); ++rank) {
    if (notes[rank].unreachable == 0) continue;
    return fmt::format("the GPUs of ranks {} and {} have no peer access", rank,
                       std::countr_zero(notes[rank].unreachable));
  }
  return {};
}

[[noreturn]] void refuse(Wish wish, const std::string& why) {
  core::throw_error(
      ErrorCode::kUnsupported, kOp,
      fmt::format("{} cannot be granted: {}. Unset it to let the library choose", variable_of(wish), why));
}

std::string lacks(const char* what, int rank) {
  return fmt::format("{} not offered by the driver of rank {}", what, rank);
}

}  // namespace

Wish wish_from_environment() {
  if (core::env_choice("ANYEP_PEER_ACCESS") == "0") return Wish::kHostMemory;
  const std::string memory = core::env_choice("ANYEP_CUDA_MEMORY").value_or("auto");
  if (memory == "vmm") return Wish::kDescriptors;
  if (memory == "fabric") return Wish::kFabric;
  if (memory == "ipc") return Wish::kIpc;
  return Wish::kAny;
}

Choice choose_sharing(std::span<const GpuNote> notes) {
  const Wish wish = common_wish(notes);
  const std::string pair = unreachable_pair(notes);
  const int no_descriptors = first_without(notes, &GpuNote::descriptors);
  const int no_fabric = first_without(notes, &GpuNote::fabric);
  const int no_host_pages = first_without(notes, &GpuNote::host_pages);
  const std::string by_descriptor = "memory by POSIX descriptors is", by_fabric = "memory by fabric handles is";

  Choice choice;
  switch (wish) {
    case Wish::kHostMemory:
      if (no_host_pages >= 0) refuse(wish, lacks("registered host memory is", no_host_pages));
      return {{Sharing::kHostMemory}, variable_of(wish)};
    case Wish::kDescriptors:
      if (!pair.empty()) refuse(wish, pair);
      if (no_descriptors >= 0) refuse(wish, lacks(by_descriptor.c_str(), no_descriptors));
      return {{Sharing::kDescriptors}, {}};
    case Wish::kFabric:
      if (!pair.empty()) refuse(wish, pair);
      if (no_fabric >= 0) refuse(wish, lacks(by_fabric.c_str(), no_fabric));
      return {{Sharing::kFabric}, variable_of(wish)};
    case Wish::kIpc:
      if (!pair.empty()) refuse(wish, pair);
      return {{Sharing::kIpc}, variable_of(wish)};
    case Wish::kAny:
      break;
  }
  if (pair.empty()) {
    if (no_descriptors < 0) choice.order.push_back(Sharing::kDescriptors);
    if (no_descriptors >= 0) choice.reason = lacks(by_descriptor.c_str(), no_descriptors);
    choice.order.push_back(Sharing::kIpc);
  } else {
    choice.reason = pair;
  }
  if (no_host_pages < 0) choice.order.push_back(Sharing::kHostMemory);
  if (choice.order.empty()) {
    core::throw_error(ErrorCode::kUnsupported, kOp,
                      fmt::format("{}, and {}", pair, lacks("registered host memory is", no_host_pages)));
  }
  return choice;
}

std::uint64_t find_unreachable(int device, std::span<const GpuNote> notes) {
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  std::uint64_t ranks = 0;
  for (int other = 0; other < count; ++other) {
    if (other == device) continue;
    int reaches = 0;
    check(cudaDeviceCanAccessPeer(&reaches, device, other), "cudaDeviceCanAccessPeer");
    if (reaches != 0) continue;
    const GpuNote its = describe_gpu(other);
    for (std::size_t rank = 0; rank < notes.size(); ++rank) {
      if (std::memcmp(notes[rank].uuid, its.uuid, sizeof(its.uuid)) == 0) ranks |= std::uint64_t{1} << rank;
    }
  }
  return ranks;
}

GpuNote describe_gpu(int device) {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  GpuNote note;
  static_assert(sizeof(properties.uuid) == sizeof(note.uuid));
  std::memcpy(note.uuid, &properties.uuid, sizeof(note.uuid));
  const SharingSupport support = sharing_support(device);
  note.descriptors = support.descriptors;
  note.fabric = support.fabric;
  note.host_pages = support.host_pages;
  note.granularity = support.descriptors ? granularity(device) : kPageBytes;
  return note;
}

}  // namespace anyep::cuda
