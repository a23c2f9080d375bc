// A packet of 128 bits arrives whole, over NVLink where there are two GPUs: its epoch vouches for the rest (pattern G').
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>

#include "packet_kernels.h"
#include "support/mirror.h"
#include "support/stream_graph.h"

namespace anyep::test {
namespace {

/// A stream and memory for packets and counts on one GPU.
class Side {
 public:
  explicit Side(int device) : device_(device) {
    must(cudaSetDevice(device_));
    must(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    void* memory = nullptr;
    must(cudaMalloc(&memory, kBytes + sizeof(PacketCounts)));
    memory_ = static_cast<std::byte*>(memory);
    must(cudaMemset(memory_, 0, kBytes + sizeof(PacketCounts)));
    must(cudaDeviceSynchronize());
    load_packet_kernels();
  }
  ~Side() {
    (void)cudaSetDevice(device_);
    (void)cudaFree(memory_);
    (void)cudaStreamDestroy(stream_);
  }
  Side(const Side&) = delete;
  Side& operator=(const Side&) = delete;

  static constexpr int kMostApart = 128;
  static constexpr std::size_t kBytes = std::size_t{kPackets} * kMostApart;
  int device() const { return device_; }
  cudaStream_t stream() const { return stream_; }
  std::byte* packets() const { return memory_; }
  PacketCounts* counts() const { return reinterpret_cast<PacketCounts*>(memory_ + kBytes); }
  PacketCounts found() const {
    PacketCounts counts;
    must(cudaSetDevice(device_));
    must(cudaStreamSynchronize(stream_));
    must(cudaMemcpy(&counts, this->counts(), sizeof counts, cudaMemcpyDeviceToHost));
    return counts;
  }

 private:
  int device_;
  cudaStream_t stream_ = nullptr;
  std::byte* memory_ = nullptr;
};

void enable_peer(int device, int other) {
  if (device == other) return;
  must(cudaSetDevice(device));
  const cudaError_t status = cudaDeviceEnablePeerAccess(other, 0);
  (void)cudaGetLastError();
  if (status != cudaErrorPeerAccessAlreadyEnabled) must(status);
}

/// @param from, to the GPU that stores and the one whose memory it is, which loads
PacketCounts race(int from, int to, int apart, PacketStore how, std::uint64_t ns) {
  const Side writer(from), reader(to);
  enable_peer(from, to);
  must(cudaSetDevice(to));
  watch_packets_for(reader.packets(), apart, ns, reader.counts(), reader.stream());
  must(cudaSetDevice(from));
  store_packets_for(reader.packets(), apart, how, ns, writer.counts(), writer.stream());
  PacketCounts counts = reader.found();
  counts.stored = writer.found().stored;
  std::printf("  GPU %d to %d, %3d bytes apart, %s: %llu stored, %llu looks, %llu saw a new one, %llu torn\n", from, to,
              apart, how == PacketStore::kWhole ? "whole" : "by halves", counts.stored, counts.loaded, counts.changed,
              counts.torn);
  return counts;
}

class Tearing : public testing::TestWithParam<PacketStore> {};

TEST_P(Tearing, OnlyPacketsStoredByHalvesAreSeenTorn) {
  if (num_gpus() == 0) GTEST_SKIP() << "no GPU";
  const char* const soak = std::getenv("ANYEP_SOAK");
  const auto ns = static_cast<std::uint64_t>(0.25e9 * (soak == nullptr ? 1.0 : std::min(std::stod(soak), 40.0)));
  const int other = num_gpus() > 1 ? 1 : 0;
  if (other != 0) {
    int reaches = 0;
    must(cudaDeviceCanAccessPeer(&reaches, 0, 1));
    if (reaches == 0) GTEST_SKIP() << "these GPUs do not reach each other's memory";
  }
  for (const auto& [from, to] : {std::pair(0, other), std::pair(other, 0)}) {
    for (const int apart : {16, 128}) {
      const PacketCounts counts = race(from, to, apart, GetParam(), ns);
      EXPECT_GT(counts.changed, 100'000u) << "the two did not run at a time";
      if (GetParam() == PacketStore::kWhole) {
        EXPECT_EQ(counts.torn, 0u);
      } else {
        EXPECT_GT(counts.torn, 0u) << "this test cannot see a torn packet";
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, Tearing, testing::Values(PacketStore::kWhole, PacketStore::kByHalves),
                         [](const auto& one) { return one.param == PacketStore::kWhole ? "Whole" : "Control"; });

}  // namespace
}  // namespace anyep::test
