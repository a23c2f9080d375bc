#include "backend/queue.h"

#include <pthread.h>
#include <signal.h>

#include <chrono>
#include <new>
#include <optional>
#include <system_error>
#include <utility>

#include "core/check.h"

namespace anyep::backend {

Queue::Queue(std::function<void(const Error&)> on_error) : on_error_(std::move(on_error)) {}

Queue::~Queue() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  if (worker_.joinable()) worker_.join();
}

std::optional<Error> Queue::guarded(const Task& task) {
  std::optional<Error> error;
  try {
    task();
  } catch (const Error& one) {
    error = one;
  } catch (const std::bad_alloc&) {
    error.emplace(ErrorCode::kResource, "out of memory in an operation");
  } catch (const std::exception& one) {
    error.emplace(ErrorCode::kInternal, std::string("an operation threw: ") + one.what());
  }
  if (error) on_error_(*error);
  return error;
}

void Queue::run(Task task) {
  {
    std::unique_lock lock(mutex_);
    if (running_ || !entries_.empty()) {
      lock.unlock();
      auto event = std::make_shared<Event::State>();
      post(std::move(task), event);
      event->wait();
      return;
    }
    running_ = true;
  }
  const std::optional<Error> error = guarded(task);
  {
    const std::lock_guard lock(mutex_);
    running_ = false;
  }
  changed_.notify_all();
  if (error) throw Error(*error);
}

void Queue::post(Task task, std::shared_ptr<Event::State> event) {
  {
    const std::lock_guard lock(mutex_);
    if (!worker_.joinable()) {
      sigset_t all, before;
      sigfillset(&all);
      pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are the user's threads' business
      try {
        worker_ = std::thread([this] { work(); });
      } catch (const std::system_error& error) {
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        core::throw_resource("queue", "pthread_create", error.code().value());
      }
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
    entries_.push_back({std::move(task), std::move(event)});
  }
  changed_.notify_all();
}

void Queue::work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return stop_ || (!entries_.empty() && !running_); });
    if (entries_.empty()) return;  // stop_: what was queued has run, or failed at once in a failed group
    if (running_) continue;
    Entry entry = std::move(entries_.front());
    entries_.pop_front();
    running_ = true;
    lock.unlock();
    const std::optional<Error> error = guarded(entry.task);
    lock.lock();
    running_ = false;
    lock.unlock();
    changed_.notify_all();
    entry.task = nullptr;  // what the task kept alive goes before its event tells
    entry.event->finish(error ? &*error : nullptr);
    entry.event.reset();
    lock.lock();
  }
}

bool Queue::drain(std::uint64_t limit_ns) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, std::chrono::nanoseconds(limit_ns), [this] { return entries_.empty() && !running_; });
}

}  // namespace anyep::backend
