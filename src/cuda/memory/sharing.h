// Which way of sharing memory a group uses: the same verdict on every rank, from what all of them say of themselves.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "cuda/memory/window.h"

namespace anyep::cuda {

/// What the user asks for (ANYEP_CUDA_MEMORY, ANYEP_PEER_ACCESS).
enum class Wish : std::uint8_t { kAny, kDescriptors, kFabric, kIpc, kHostMemory };
/// @throws Error kArgument
Wish wish_from_environment();

/// What a rank tells the others of its GPU. Plain bytes: it travels.
struct GpuNote {
  std::uint64_t window_id = 0;    ///< of the window that it will make
  std::uint64_t granularity = 0;  ///< of its GPU's memory
  std::uint8_t uuid[16] = {};     ///< of its GPU
  std::uint64_t unreachable = 0;  ///< bit r: its GPU cannot access rank r's; 0 where that is not known
  Wish wish = Wish::kAny;
  bool descriptors = false, fabric = false, host_pages = false;  ///< SharingSupport
  std::uint8_t padding[4] = {};
};
static_assert(sizeof(GpuNote) == 48);

struct Choice {
  std::vector<Sharing> order;  ///< best first: where one turns out not to be permitted, the next is tried
  std::string reason;          ///< why not the best of all; empty when it is
};

/// @throws Error kMismatch (ranks wish differently), kUnsupported (a wish that a rank or pair cannot grant)
Choice choose_sharing(std::span<const GpuNote> notes);

/// The same rank by rank: GPUs that this process sees and its `device` cannot access.
std::uint64_t find_unreachable(int device, std::span<const GpuNote> notes);
/// Of this rank's GPU. @throws Error kUnsupported, kDevice
GpuNote describe_gpu(int device);

}  // namespace anyep::cuda
