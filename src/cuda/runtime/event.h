// Events without timing, kept for the next use: making one costs more than recording it.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <memory>

#include "cuda/memory/heap.h"

namespace anyep::cuda {

/// One recorded event. Its pool gets it back when nobody holds the handle any more. Thread-safe.
class EventHandle final : public Completion {
 public:
  class Shelf;  ///< where idle events lie
  EventHandle(std::shared_ptr<Shelf> shelf, cudaEvent_t event);
  ~EventHandle() override;

  cudaEvent_t get() const noexcept { return event_; }
  /// Is everything done that was on the stream when it was recorded? Never waits. True also after a failure of the device:
  /// that work will not go on; status() tells.
  bool done() const noexcept override;
  cudaError_t status() const noexcept;  ///< cudaSuccess, cudaErrorNotReady or the failure
  /// `stream`, of any device, goes on only after that work. @throws Error kDevice
  void make_wait(cudaStream_t stream) const;

 private:
  std::shared_ptr<Shelf> shelf_;
  cudaEvent_t event_;
  mutable std::atomic<bool> done_ = false;
};

/// Of one device: the one that is current when it is used. Thread-safe; handles may outlive it.
class EventPool {
 public:
  EventPool();
  /// The work that `stream` holds now. @throws Error kDevice
  std::shared_ptr<EventHandle> record(cudaStream_t stream);

 private:
  std::shared_ptr<EventHandle::Shelf> shelf_;
};

}  // namespace anyep::cuda
