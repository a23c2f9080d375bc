// What the public handles of engine.h point to.
#pragma once

#include <anyep/error.h>
#include <anyep/event.h>
#include <anyep/handle.h>
#include <anyep/types.h>

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace anyep {

/// Ends once: well, or with an error that every wait throws. As it is: completed by a host thread. Backends whose ops run on
/// a device's stream derive theirs.
struct Event::State {
  State() = default;
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  virtual ~State() = default;

  /// 0 = the op that completes it keeps its own limit; else wait() gives up after this long.
  std::uint64_t limit_ns = 0;
  const char* op = "event";

  void finish(const Error* error) noexcept;
  virtual bool done() const noexcept;
  virtual void wait() const;  ///< throws the error
  /// False when `limit` passed first. Throws the event's error.
  virtual bool wait_for(std::uint64_t limit) const;
  /// What comes next on the stream waits; where there is no stream, the caller does.
  virtual void make_wait(StreamRef) const { wait(); }
  /// Ends on a device's stream, where make_wait() holds up the stream and not the caller.
  virtual bool ends_on_stream() const { return false; }
  /// Runs `then` once the event has ended, well or not: now, or by the thread that ends it.
  void when_done(std::function<void()> then) const;

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  mutable std::vector<std::function<void()>> then_;
  bool done_ = false;
  std::optional<Error> error_;
};

/// Arrays of a handle in a device's memory, kept by their backend.
struct DeviceArrays {
  virtual ~DeviceArrays() = default;
  /// In the order of HandleArrays. @throws Error kState for one that is not there yet.
  virtual TensorView rows_until() = 0;
  virtual TensorView place() = 0;
  virtual TensorView source() = 0;
  virtual TensorView tokens() = 0;
};

struct Handle::State {
  int num_ranks = 0, rank = 0;
  int num_experts = 0;  ///< 0 = adopted: unknown
  std::int64_t num_tokens = 0;
  std::shared_ptr<Event::State> routed;  ///< null = the arrays are there
  std::vector<std::int32_t> rows_until, place, source, tokens;
  std::vector<std::int64_t> pairs_per_expert;
  /// Set by backends of devices; then `place` and `source` stay empty, and the rest is there once `routed` is done.
  std::shared_ptr<DeviceArrays> device;

  std::int64_t num_rows() const { return rows_until.empty() ? 0 : rows_until.back(); }
  /// First row from source `s`.
  std::int64_t first_row(int s) const { return s == 0 ? 0 : rows_until[static_cast<std::size_t>(s - 1)]; }
  std::int64_t last_row(int s) const { return rows_until[static_cast<std::size_t>(s)]; }
};

struct OwnedRows::State {
  Rows rows;
  std::int64_t num_rows = 0;
  std::vector<std::int32_t> experts;
  std::vector<float> weights;
  std::shared_ptr<void> memory;                  ///< keeps the window mapped
  std::function<void()> release;                 ///< gives the heap range back
  std::function<void(std::int64_t)> keep_front;  ///< gives back what lies behind so many rows of x; empty = all stays

  State() = default;
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  ~State() {
    if (release) release();
  }
};

struct Pending::State {
  std::function<Event(StreamRef)> receive;  ///< empty once received
  std::shared_ptr<Event::State> sent;
};

}  // namespace anyep
