#include "packet_kernels.h"

#include "../support/stream_graph.h"
#include "cuda/device/ptx.cuh"
#include "protocol/platform.h"

namespace anyep::test {
namespace {

constexpr int kThreads = 256, kBlocks = kPackets / kThreads;
constexpr int kRoundsPerLook = 64;  ///< at the clock

/// Every bit of one half follows from the other.
__device__ std::uint64_t other_half(std::uint64_t low) {
  return (low ^ low >> 29) * 0x9E3779B97F4A7C15ull ^ 0xA5A5'5A5A'0F0F'F0F0ull;
}

__global__ void store_kernel(std::byte* packets, int apart, PacketStore how, std::uint64_t ns, PacketCounts* counts) {
  const int thread = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const std::uint64_t from = protocol::now_ns();
  std::byte* const packet = packets + static_cast<std::int64_t>(thread) * apart;
  auto* const halves = reinterpret_cast<std::uint64_t*>(packet);
  std::uint64_t number = static_cast<std::uint64_t>(thread) << 40, stored = 0;
  do {
    for (int round = 0; round < kRoundsPerLook; ++round) {
      ++number, ++stored;
      const std::uint64_t low = number * 0xD1342543DE82EF95ull;
      if (how == PacketStore::kWhole) {
        cuda::ptx::store_packet(packet, low, other_half(low));
      } else {
        protocol::Shared(halves[0]).store(low, protocol::kRelaxed);
        protocol::Shared(halves[1]).store(other_half(low), protocol::kRelaxed);
      }
    }
  } while (protocol::now_ns() - from < ns);
  atomicAdd(&counts->stored, static_cast<unsigned long long>(stored));
}

__global__ void watch_kernel(const std::byte* packets, int apart, std::uint64_t ns, PacketCounts* counts) {
  const int thread = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const std::uint64_t from = protocol::now_ns();
  const std::byte* const packet = packets + static_cast<std::int64_t>(thread) * apart;
  std::uint64_t loaded = 0, changed = 0, torn = 0, before = 0;
  do {
    for (int round = 0; round < kRoundsPerLook; ++round) {
      std::uint64_t low, high;
      cuda::ptx::load_packet(packet, low, high);
      ++loaded;
      changed += low != before ? 1 : 0;
      before = low;
      const bool fresh_memory = low == 0 && high == 0;
      torn += !fresh_memory && high != other_half(low) ? 1 : 0;
    }
  } while (protocol::now_ns() - from < ns);
  atomicAdd(&counts->loaded, static_cast<unsigned long long>(loaded));
  atomicAdd(&counts->changed, static_cast<unsigned long long>(changed));
  atomicAdd(&counts->torn, static_cast<unsigned long long>(torn));
}

}  // namespace

void load_packet_kernels() {
  cudaFuncAttributes attributes{};
  must(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(store_kernel)));
  must(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(watch_kernel)));
}

void store_packets_for(void* packets, int apart, PacketStore how, std::uint64_t ns, PacketCounts* counts,
                       cudaStream_t stream) {
  store_kernel<<<kBlocks, kThreads, 0, stream>>>(static_cast<std::byte*>(packets), apart, how, ns, counts);
  must(cudaGetLastError());
}

void watch_packets_for(const void* packets, int apart, std::uint64_t ns, PacketCounts* counts, cudaStream_t stream) {
  watch_kernel<<<kBlocks, kThreads, 0, stream>>>(static_cast<const std::byte*>(packets), apart, ns, counts);
  must(cudaGetLastError());
}

}  // namespace anyep::test
