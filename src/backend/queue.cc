#include "backend/queue.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <new>
#include <optional>
#include <system_error>
#include <utility>

#include "core/check.h"

namespace anyep::backend {

Queue::Queue(std::function<void(const Error&)> on_error)
    : on_error_(std::move(on_error)), owner_(::getpid()), state_(std::make_unique<State>()) {}

Queue::~Queue() {
  if (::getpid() != owner_) {
    // The worker was not forked. To destroy what it waits on would wait for it; what it locked is locked for good.
    static std::atomic<State*> left_alone = nullptr;
    state_->before = left_alone.exchange(state_.get());
    (void)state_.release();
    return;
  }
  {
    const std::lock_guard lock(state_->mutex);
    state_->stop = true;
  }
  state_->changed.notify_all();
  if (state_->worker.joinable()) state_->worker.join();
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
    std::unique_lock lock(state_->mutex);
    if (state_->running || !state_->entries.empty()) {
      lock.unlock();
      auto event = std::make_shared<Event::State>();
      post(std::move(task), event);
      event->wait();
      return;
    }
    state_->running = true;
  }
  const std::optional<Error> error = guarded(task);
  {
    const std::lock_guard lock(state_->mutex);
    state_->running = false;
  }
  state_->changed.notify_all();
  if (error) throw Error(*error);
}

void Queue::post(Task task, std::shared_ptr<Event::State> event) {
  {
    const std::lock_guard lock(state_->mutex);
    if (!state_->worker.joinable()) {
      sigset_t all, before;
      sigfillset(&all);
      pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are the user's threads' business
      try {
        state_->worker = std::thread([this] { work(); });
      } catch (const std::system_error& error) {
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        core::throw_resource("queue", "pthread_create", error.code().value());
      }
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
    state_->entries.push_back({std::move(task), std::move(event)});
  }
  state_->changed.notify_all();
}

void Queue::work() {
  std::unique_lock lock(state_->mutex);
  for (;;) {
    state_->changed.wait(lock, [this] { return state_->stop || (!state_->entries.empty() && !state_->running); });
    if (state_->entries.empty()) return;  // state_->stop: what was queued has run, or failed at once in a failed group
    if (state_->running) continue;
    Entry entry = std::move(state_->entries.front());
    state_->entries.pop_front();
    state_->running = true;
    lock.unlock();
    const std::optional<Error> error = guarded(entry.task);
    lock.lock();
    state_->running = false;
    lock.unlock();
    state_->changed.notify_all();
    entry.task = nullptr;  // what the task kept alive goes before its event tells
    entry.event->finish(error ? &*error : nullptr);
    entry.event.reset();
    lock.lock();
  }
}

bool Queue::drain(std::uint64_t limit_ns) {
  std::unique_lock lock(state_->mutex);
  return state_->changed.wait_for(lock, std::chrono::nanoseconds(limit_ns),
                                  [this] { return state_->entries.empty() && !state_->running; });
}

}  // namespace anyep::backend
