// Events without timing, kept for the next use: making one costs more than recording it.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <utility>

namespace anyep::cuda {

class EventPool;

/// One event of a pool, which gets it back. Moves only.
class Event {
 public:
  Event() = default;
  Event(Event&& other) noexcept
      : pool_(std::move(other.pool_)), event_(std::exchange(other.event_, nullptr)), device_(other.device_) {}
  Event& operator=(Event&& other) noexcept {
    std::swap(pool_, other.pool_);
    std::swap(event_, other.event_);
    std::swap(device_, other.device_);
    return *this;
  }
  ~Event();

  explicit operator bool() const noexcept { return event_ != nullptr; }
  cudaEvent_t get() const noexcept { return event_; }
  int device() const noexcept { return device_; }

  /// The work that `stream`, of this event's device, holds now. @throws Error kDevice
  void record(cudaStream_t stream) const;
  /// Has the recorded work finished? Never waits; true if nothing was recorded. @throws Error kDevice
  bool done() const;
  /// `stream`, of any device, goes on only after the recorded work. @throws Error kDevice
  void hold_back(cudaStream_t stream) const;

 private:
  friend class EventPool;
  Event(std::shared_ptr<EventPool> pool, cudaEvent_t event, int device) noexcept
      : pool_(std::move(pool)), event_(event), device_(device) {}

  std::shared_ptr<EventPool> pool_;
  cudaEvent_t event_ = nullptr;
  int device_ = 0;
};

/// Thread-safe. Lives as long as any of its events.
class EventPool : public std::enable_shared_from_this<EventPool> {
 public:
  static std::shared_ptr<EventPool> of_device(int device);
  ~EventPool();
  Event take();  ///< @throws Error kDevice

 private:
  friend class Event;
  struct Free;
  explicit EventPool(int device);
  void give_back(cudaEvent_t event) noexcept;

  int device_;
  std::unique_ptr<Free> free_;
};

}  // namespace anyep::cuda
