// The inside of an engine: what its calls share. One caller at a time; ops in order; the first error stays.
#pragma once

#include <anyep/engine.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "backend/checks.h"
#include "backend/queue.h"
#include "core/check.h"
#include "core/fault_point.h"
#include "core/tuning.h"
#include "protocol/word.h"

namespace anyep {

using backend::Call;

/// Errors that spoil one op and leave the engine usable.
inline bool spares_the_engine(ErrorCode code) {
  return code == ErrorCode::kArgument || code == ErrorCode::kCapacity || code == ErrorCode::kState ||
         code == ErrorCode::kUnsupported;
}

class Engine::Core {
 public:
  Core(std::unique_ptr<backend::Backend> the_backend, const Budget& budget, const Topology& the_topology,
       const Tuning& the_tuning)
      : backend(std::move(the_backend)),
        topology(the_topology),
        tuning(the_tuning),
        queue([this](const Error& error) { spoil(error); }) {
    limits.num_ranks = topology.num_ranks();
    limits.rank = topology.rank;
    limits.budget = budget;
    limits.layout = core::WindowLayout::make(budget, limits.num_ranks);
    limits.checked = tuning.checked;
    limits.on_device = backend->runs_on_stream();
    *self = this;
  }
  ~Core() { *self = nullptr; }

  /// One caller at a time; alive; not failed.
  class Entry {
   public:
    Entry(Core& core, const char* op) : core_(core) {
      if (core.busy.exchange(true)) {
        core::throw_error(ErrorCode::kState, op, "another thread is inside a call of this engine");
      }
      try {
        core.must_be_usable(op);
      } catch (...) {
        core.busy = false;
        throw;
      }
    }
    ~Entry() { core_.busy = false; }
    Entry(const Entry&) = delete;
    Entry& operator=(const Entry&) = delete;

   private:
    Core& core_;
  };

  void must_be_usable(const char* op) const {
    if (::getpid() != owner) core::throw_error(ErrorCode::kState, op, "the engine belongs to the process that made it");
    if (closing) core::throw_error(ErrorCode::kState, op, "the engine is closed");
    must_not_have_failed(op, "between");
  }

  /// What the watcher found is nobody's op: it is met by the call that comes next, or that waits.
  void must_not_have_failed(const char* op, const char* phase) const {
    const std::optional<Error> first = backend->first_error();
    if (!first) return;
    seen = true;
    throw core::met_in(*first, op, phase);
  }

  /// The error of a failed engine that no call has met yet, met by close().
  void must_not_hide_an_error() const {
    if (!seen) must_not_have_failed("close", "close");
  }

  /// The next collective call. A refused call takes a number too, so that ranks stay in step.
  Call next_call(Op op, StreamRef stream, const Options& options) {
    core::fault_point("between", limits.rank, number);
    number = protocol::next_epoch(number);
    Call call;
    call.op = name_of(op);
    call.kind = static_cast<unsigned>(op) + 1;
    call.number = number;
    const auto steady = core::scaled(tuning.timeout, tuning);
    const auto first = std::max(core::scaled(tuning.startup_timeout, tuning), steady);
    const auto usual = options.timeout ? core::scaled(*options.timeout, tuning) : steady;
    const auto limit = options.timeout || first_done ? usual : first;
    call.limit_ns = static_cast<std::uint64_t>(limit.count());
    call.graph_limit_ns = static_cast<std::uint64_t>(usual.count());
    call.num_sms = options.num_sms;
    call.stream = stream;
    call.description[0] = call.kind;
    return call;
  }

  /// Runs the checks of a collective call; peers learn of a refusal instead of waiting for this rank.
  template <class Check>
  auto checked(const Call& call, const Options& options, Check&& check) {
    try {
      backend::check_options(call.op, options);
      return check();
    } catch (const Error& error) {
      throw refused(call, error);
    }
  }

  /// Peers learn why this rank does not take part.
  Error refused(const Call& call, const Error& error) {
    Error named = error;
    named.rank = limits.rank;
    backend->refused(call.number, named);
    seen = true;  // if the group fails, it is because of this
    return named;
  }

  /// Waits for an event that need not be this engine's, but no longer than the engine lives. False at the limit.
  bool wait_for(const Event::State& event, const Call& call) const {
    constexpr std::uint64_t kLookEveryNs = 5'000'000;
    for (std::uint64_t left = call.limit_ns; left > 0;) {
      const std::uint64_t step = std::min(left, kLookEveryNs);
      if (event.wait_for(step)) return true;
      must_not_have_failed(call.op, "before_send");
      left -= step;
    }
    return false;
  }

  /// Awaits what the op comes after, within the op's limit.
  void await(const std::vector<Event>& after, const Call& call) const {
    for (const Event& event : after) {
      if (event.state_ == nullptr || wait_for(*event.state_, call)) continue;
      Error error(ErrorCode::kTimeout, fmt::format("{}: an event that it comes after was not completed within {:.3f} s",
                                                   call.op, static_cast<double>(call.limit_ns) * 1e-9));
      error.op = call.op;
      error.phase = "before_send";
      error.limit_ns = call.limit_ns;
      throw error;
    }
  }

  /// The same; what went wrong before is this rank's own, and the peers do not wait for an op that never begins here.
  void await_or_refuse(const std::vector<Event>& after, const Call& call) {
    try {
      await(after, call);
    } catch (const Error& error) {
      if (!spares_the_engine(error.code)) throw;
      throw refused(call, error);
    }
  }

  /// The stream awaits what the op comes after.
  void hold_back_stream(const std::vector<Event>& after, const Call& call) const {
    for (const Event& event : after) {
      if (event.state_ == nullptr) continue;
      if (event.state_->ends_on_stream()) {
        event.state_->make_wait(call.stream);
      } else if (event.state_->done()) {
        event.state_->wait();  // throws what went wrong
      } else {
        backend->hold_back(call, *event.state_);
      }
    }
  }

  /// An op of a backend that runs on streams: `body` puts it on the call's stream, now.
  Event submit_to_stream(const Call& call, const Options& options, const std::function<void()>& body) {
    try {
      hold_back_stream(options.after, call);
      launch(body);
    } catch (const Error& error) {
      if (!spares_the_engine(error.code)) throw;
      throw refused(call, error);
    }
    Event event(backend->record(call));
    if (options.wait) event.wait();
    return event;
  }

  /// What goes wrong in a launch spoils the engine as it does on the queue.
  void launch(const std::function<void()>& body) {
    try {
      body();
    } catch (const Error& error) {
      spoil(error);
      throw;
    }
    first_done = true;
  }

  /// What went wrong in an op, unless it spares the engine.
  void spoil(const Error& error) {
    if (spares_the_engine(error.code)) return;
    seen = true;
    backend->fail(error);
  }

  /// On the stream; or inline when the caller waits, else on the worker.
  Event submit(const Call& call, const Options& options, std::function<void()> body) {
    if (backend->runs_on_stream()) return submit_to_stream(call, options, body);
    auto task = [this, call, after = options.after, body = std::move(body)] {
      await_or_refuse(after, call);
      body();
      first_done = true;
    };
    if (options.wait) {
      queue.run(std::move(task));
      return Event();
    }
    auto event = std::make_shared<Event::State>();
    try {
      queue.post(std::move(task), event);
    } catch (const Error& error) {
      throw refused(call, error);
    }
    return Event(std::move(event));
  }

  // ---- routes and dispatches: what calls of one and of both share (engine.cc, engine_fresh.cc) ----
  /// Checks and describes; the handle that the route is to fill.
  backend::RouteCall checked_route(Call& call, const Shape& shape, const Routing& routing, const Options& options);
  Event submit_route(const Call& call, const backend::RouteCall& route, const Options& options);
  /// Checks and describes. @throws Error, for the caller to tell the peers
  backend::DispatchCall checked_dispatch(Call& call, const Rows& x, const std::shared_ptr<Handle::State>& handle,
                                         const Rows& out);
  /// The handle's arrays are there; a route that failed is the caller's to notice.
  void await_route(const Call& call, const Handle::State& handle) const;
  /// Waits for the counts behind a dispatch of whole_or_nothing. Where nothing has moved, the call's number is free for the
  /// dispatch that does its work.
  void settle(const Call& call, const backend::DispatchCall& dispatch, Fresh& fresh);
  /// Rows made inside a call, which make_rows_ahead() serves meanwhile.
  Rows rows_of(const std::function<Rows()>& make);
  /// On CPU ranks, between the calls of route and dispatch: an Error is the dispatch's.
  Rows rows_or_refusal(const std::function<Rows()>& make, StreamRef stream, const Options& options);

  /// Once `closing` is set: waits until no other thread is inside a call and no op is queued or running. False at the
  /// limit.
  bool becomes_quiet(std::chrono::nanoseconds limit) {
    const auto until = std::chrono::steady_clock::now() + limit;
    while (busy) {  // first: who is inside may still queue an op
      if (std::chrono::steady_clock::now() > until) return false;
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
    const std::chrono::nanoseconds left = until - std::chrono::steady_clock::now();
    return queue.drain(static_cast<std::uint64_t>(std::max<std::int64_t>(left.count(), 0)));
  }

  std::unique_ptr<backend::Backend> backend;
  const Topology topology;
  const Tuning tuning;
  backend::Limits limits;
  const pid_t owner = ::getpid();
  std::atomic<bool> busy = false;
  std::atomic<std::thread::id> making_rows;  ///< by the thread that is inside a call, for that call
  std::atomic<bool> closing = false;         ///< close() has begun
  std::atomic<bool> closed = false;
  std::atomic<bool> first_done = false;
  mutable std::atomic<bool> seen = false;  ///< the caller knows that, or why, the engine fails
  std::uint32_t number = protocol::kFirstEpoch;
  std::int64_t most_tokens = 0;  ///< of a rank, in the route whose counts were looked at last
  /// Low-latency sends whose hook has not been called, by their count of sends.
  std::deque<std::uint64_t> unreceived;
  std::uint64_t num_low_latency_sends = 0;
  bool combine_buffer_given = false;
  std::shared_ptr<Core*> self = std::make_shared<Core*>(nullptr);  ///< null once the engine is gone: hooks look
  backend::Queue queue;  ///< last: its worker ends before anything that tasks use
};

}  // namespace anyep
