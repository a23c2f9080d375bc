#include "bench/probes/peer_memory.h"

#include <unistd.h>

#include <cstring>
#include <span>

#include "bench/probes/check.h"

namespace anyep::bench {
namespace {

struct Card {
  long process;
  int device;
  std::byte* base;
  cudaIpcMemHandle_t handle;
};

void reach(int device) {
  const cudaError_t status = cudaDeviceEnablePeerAccess(device, 0);
  if (status == cudaErrorPeerAccessAlreadyEnabled) {
    (void)cudaGetLastError();
    return;
  }
  check(status, "cudaDeviceEnablePeerAccess");
}

}  // namespace

int device_of(int rank, int num_gpus) {
  return rank % num_gpus;
}

PeerMemory::PeerMemory(Meeting& meeting, int rank, std::size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes), "cudaMalloc");
  own_ = static_cast<std::byte*>(memory);
  check(cudaMemset(own_, 0, bytes), "cudaMemset");
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");

  Card mine{};
  mine.process = getpid();
  mine.base = own_;
  check(cudaGetDevice(&mine.device), "cudaGetDevice");
  check(cudaIpcGetMemHandle(&mine.handle, own_), "cudaIpcGetMemHandle");
  const std::vector<std::byte> all = meeting.gather(rank, std::as_bytes(std::span(&mine, 1)));
  for (int peer = 0; peer < meeting.num_ranks(); ++peer) {
    Card card{};
    std::memcpy(&card, all.data() + static_cast<std::size_t>(peer) * sizeof(Card), sizeof(Card));
    if (card.process == mine.process) {
      if (card.device != mine.device) reach(card.device);
      base_.push_back(card.base);
      continue;
    }
    void* mapped = nullptr;
    check(cudaIpcOpenMemHandle(&mapped, card.handle, cudaIpcMemLazyEnablePeerAccess), "cudaIpcOpenMemHandle");
    opened_.push_back(mapped);
    base_.push_back(static_cast<std::byte*>(mapped));
  }
  meeting.barrier();
}

PeerMemory::~PeerMemory() {
  for (void* const mapped : opened_) (void)cudaIpcCloseMemHandle(mapped);
  (void)cudaFree(own_);
}

probes::Peers PeerMemory::at(std::size_t offset) const {
  probes::Peers peers;
  for (std::size_t rank = 0; rank < base_.size(); ++rank) peers.base[rank] = base_[rank] + offset;
  return peers;
}

}  // namespace anyep::bench
