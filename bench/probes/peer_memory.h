// A block of GPU memory per rank that all ranks reach, threads of one process or processes.
#pragma once

#include <cstddef>
#include <vector>

#include "bench/probes/kernels.h"
#include "bench/probes/meeting.h"

namespace anyep::bench {

/// GPU of each rank: ranks share the GPUs in turn where there are fewer.
int device_of(int rank, int num_gpus);

class PeerMemory {
 public:
  /// Zeroed, on the current device. Collective. @throws std::runtime_error without peer access between two GPUs
  PeerMemory(Meeting& meeting, int rank, std::size_t bytes);
  PeerMemory(const PeerMemory&) = delete;
  PeerMemory& operator=(const PeerMemory&) = delete;
  ~PeerMemory();

  std::byte* own() const { return own_; }
  /// Byte `offset` of every rank's block.
  probes::Peers at(std::size_t offset) const;

 private:
  std::byte* own_ = nullptr;
  std::vector<std::byte*> base_;
  std::vector<void*> opened_;
};

}  // namespace anyep::bench
