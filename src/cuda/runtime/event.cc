#include "cuda/runtime/event.h"

#include <mutex>
#include <vector>

#include "cuda/runtime/check.h"
#include "cuda/runtime/device_guard.h"

namespace anyep::cuda {

class EventHandle::Shelf {
 public:
  ~Shelf() {
    for (const cudaEvent_t event : idle_) log_failure(cudaEventDestroy(event), "cudaEventDestroy");
  }

  cudaEvent_t take() {
    cudaEvent_t event = nullptr;
    {
      const std::lock_guard lock(mutex_);
      if (!idle_.empty()) {
        event = idle_.back();
        idle_.pop_back();
        return event;
      }
      // Room for every event that was ever made: put() cannot fail.
      if (idle_.capacity() < ++made_) idle_.reserve(2 * made_);
    }
    const OutsideCapture outside;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
    return event;
  }

  void put(cudaEvent_t event) noexcept {
    const std::lock_guard lock(mutex_);
    idle_.push_back(event);
  }

 private:
  std::mutex mutex_;
  std::vector<cudaEvent_t> idle_;
  std::size_t made_ = 0;
};

EventHandle::EventHandle(std::shared_ptr<Shelf> shelf, cudaEvent_t event) : shelf_(std::move(shelf)), event_(event) {}

EventHandle::~EventHandle() {
  shelf_->put(event_);
}

cudaError_t EventHandle::status() const noexcept {
  const OutsideCapture outside;
  const cudaError_t status = cudaEventQuery(event_);
  if (status != cudaSuccess) (void)cudaGetLastError();
  return status;
}

bool EventHandle::done() const noexcept {
  // Recorded once: what is over stays so, and many ask.
  if (done_.load(std::memory_order_acquire)) return true;
  if (status() == cudaErrorNotReady) return false;
  done_.store(true, std::memory_order_release);
  return true;
}

void EventHandle::make_wait(cudaStream_t stream) const {
  check(cudaStreamWaitEvent(stream, event_, 0), "cudaStreamWaitEvent");
}

EventPool::EventPool() : shelf_(std::make_shared<EventHandle::Shelf>()) {}

std::shared_ptr<EventHandle> EventPool::record(cudaStream_t stream) {
  const auto handle = std::make_shared<EventHandle>(shelf_, shelf_->take());
  check(cudaEventRecord(handle->get(), stream), "cudaEventRecord");
  return handle;
}

}  // namespace anyep::cuda
