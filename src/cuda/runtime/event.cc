#include "cuda/runtime/event.h"

#include <mutex>
#include <vector>

#include "cuda/runtime/check.h"
#include "cuda/runtime/device_guard.h"

namespace anyep::cuda {

struct EventPool::Free {
  std::mutex mutex;
  std::vector<cudaEvent_t> events;
};

EventPool::EventPool(int device) : device_(device), free_(std::make_unique<Free>()) {}

std::shared_ptr<EventPool> EventPool::of_device(int device) {
  return std::shared_ptr<EventPool>(new EventPool(device));
}

EventPool::~EventPool() {
  for (const cudaEvent_t event : free_->events) log_failure(cudaEventDestroy(event), "cudaEventDestroy");
}

Event EventPool::take() {
  cudaEvent_t event = nullptr;
  {
    const std::lock_guard lock(free_->mutex);
    if (!free_->events.empty()) {
      event = free_->events.back();
      free_->events.pop_back();
    } else {
      // give_back() must not fail: there is always room for every event that was made.
      free_->events.reserve(free_->events.capacity() + 1);
    }
  }
  if (event == nullptr) {
    const DeviceGuard on_device(device_);
    const OutsideCapture outside;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  }
  return Event(shared_from_this(), event, device_);
}

void EventPool::give_back(cudaEvent_t event) noexcept {
  const std::lock_guard lock(free_->mutex);
  free_->events.push_back(event);
}

Event::~Event() {
  if (event_ != nullptr) pool_->give_back(event_);
}

void Event::record(cudaStream_t stream) const {
  check(cudaEventRecord(event_, stream), "cudaEventRecord");
}

bool Event::done() const {
  const OutsideCapture outside;
  const cudaError_t status = cudaEventQuery(event_);
  if (status == cudaErrorNotReady) {
    (void)cudaGetLastError();
    return false;
  }
  check(status, "cudaEventQuery");
  return true;
}

void Event::hold_back(cudaStream_t stream) const {
  check(cudaStreamWaitEvent(stream, event_, 0), "cudaStreamWaitEvent");
}

}  // namespace anyep::cuda
