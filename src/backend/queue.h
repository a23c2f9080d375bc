// The engine's queue: ops run one at a time, in order; on the caller's thread when it waits anyway and nothing is
// queued, else on one worker thread, which starts with the first op that needs it.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "backend/state.h"

namespace anyep::backend {

class Queue {
 public:
  /// `on_error` sees every error of a task before its event does.
  explicit Queue(std::function<void(const Error&)> on_error);
  ~Queue();
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;

  using Task = std::function<void()>;
  /// Runs the task here when the queue is empty; otherwise behind the queue, and waits. Throws the task's error.
  void run(Task task);
  /// Runs the task on the worker. @throws Error kResource when no thread can be started.
  void post(Task task, std::shared_ptr<Event::State> event);
  /// Waits until nothing is queued or running, at most `limit_ns`; false when something still is.
  bool drain(std::uint64_t limit_ns);

 private:
  struct Entry {
    Task task;
    std::shared_ptr<Event::State> event;
  };
  struct State {
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<Entry> entries;
    bool running = false, stop = false;
    std::thread worker;
    State* before = nullptr;  ///< in a forked child: another one left alone
  };
  void work();
  /// Runs one task; its error, if any.
  std::optional<Error> guarded(const Task& task);

  std::function<void(const Error&)> on_error_;
  const pid_t owner_;
  std::unique_ptr<State> state_;
};

}  // namespace anyep::backend
