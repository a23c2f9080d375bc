// The end of an operation, and the receive hook of low latency.
#pragma once

#include <anyep/types.h>

#include <memory>

namespace anyep {

/// Marks the end of one op. Copies share it. A default-constructed event is complete.
class ANYEP_API Event {
 public:
  struct State;
  Event();
  explicit Event(std::shared_ptr<State> state);

  /// The stream waits, the host does not; on CPU ranks the caller waits.
  void make_wait(StreamRef) const;
  /// The host waits, within the op's limit. @throws Error what went wrong; every copy throws it, every time.
  void wait() const;
  /// Has the op ended, well or not? Never waits.
  bool done() const noexcept;

  /// An event that user code completes, to order engine work after work of its own.
  static Event manual();
  void complete() const;  ///< of manual() only, once

 private:
  friend class Engine;
  std::shared_ptr<State> state_;
};

/// The receive half of a low-latency op. Moves only. Dropped without receive(), it still counts as in flight.
class ANYEP_API Pending {
 public:
  struct State;
  explicit Pending(std::shared_ptr<State> state);
  Pending(Pending&&) noexcept;
  Pending& operator=(Pending&&) noexcept;
  ~Pending();

  /// The hook: once, in the order of the sends, by the engine's caller; runs the receive half on this thread. Without the
  /// hook option it only gives the event. @throws Error kState: called twice, out of order, after close.
  Event receive(StreamRef = {});

 private:
  std::shared_ptr<State> state_;
};

}  // namespace anyep
