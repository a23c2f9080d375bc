// Packets of 128 bits under fire: one GPU stores, another loads, as low latency does.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace anyep::test {

struct PacketCounts {
  unsigned long long stored, loaded, changed,
      torn;  ///< packets; of those loaded: other than the look before; halves apart
};

/// Each has one thread that stores it and one that looks at it.
inline constexpr int kPackets = 8192;

/// How a writer stores the two halves of a packet.
enum class PacketStore { kWhole, kByHalves };

void load_packet_kernels();
/// Stores ever new numbers into every packet until `ns` are over; both halves of a packet follow from one number. Packets
/// begin every `apart` bytes, a multiple of 16.
void store_packets_for(void* packets, int apart, PacketStore how, std::uint64_t ns, PacketCounts* counts,
                       cudaStream_t stream);
/// Looks at every packet until `ns` are over.
void watch_packets_for(const void* packets, int apart, std::uint64_t ns, PacketCounts* counts, cudaStream_t stream);

}  // namespace anyep::test
