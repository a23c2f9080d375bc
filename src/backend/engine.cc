// Checks, order of ops, errors that stay.
#include <anyep/engine.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "backend/backend.h"
#include "backend/checks.h"
#include "backend/queue.h"
#include "core/check.h"
#include "core/fault_point.h"
#include "core/log.h"
#include "core/tuning.h"
#include "protocol/word.h"

namespace anyep {

using backend::Call;

namespace {

/// Errors that spoil one op and leave the engine usable.
bool spares_the_engine(ErrorCode code) {
  return code == ErrorCode::kArgument || code == ErrorCode::kCapacity || code == ErrorCode::kState ||
         code == ErrorCode::kUnsupported;
}

}  // namespace

class Engine::Core {
 public:
  Core(std::unique_ptr<backend::Backend> the_backend, const Budget& budget, const Topology& the_topology,
       const Tuning& the_tuning)
      : backend(std::move(the_backend)), topology(the_topology), tuning(the_tuning), queue([this](const Error& error) {
          if (spares_the_engine(error.code)) return;
          seen = true;
          backend->fail(error);
        }) {
    limits.num_ranks = topology.num_ranks();
    limits.rank = topology.rank;
    limits.budget = budget;
    limits.layout = core::WindowLayout::make(budget, limits.num_ranks);
    limits.checked = tuning.checked;
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
    if (closed) core::throw_error(ErrorCode::kState, op, "the engine is closed");
    must_not_have_failed(op, "between");
  }

  /// What the watcher found is nobody's op: it is met by the call that comes next, or that waits.
  void must_not_have_failed(const char* op, const char* phase) const {
    const std::optional<Error> first = backend->first_error();
    if (!first) return;
    seen = true;
    if (!first->op.empty()) throw Error(*first);
    Error error = core::reworded(*first, fmt::format("{} (phase {}): {}", op, phase, first->what()));
    error.op = op;
    error.phase = phase;
    throw error;
  }

  /// The error of a failed engine that no call has met yet, met by close().
  void must_not_hide_an_error() const {
    if (!seen) must_not_have_failed("close", "close");
  }

  /// The next collective call. A refused call takes a number too, so that ranks stay in step.
  Call next_call(Op op, const Options& options) {
    core::fault_point("between", limits.rank, number);
    number = protocol::next_epoch(number);
    Call call;
    call.op = name_of(op);
    call.kind = static_cast<unsigned>(op) + 1;
    call.number = number;
    const auto steady = core::scaled(tuning.timeout, tuning);
    const auto first = std::max(core::scaled(tuning.startup_timeout, tuning), steady);
    const auto limit = options.timeout ? core::scaled(*options.timeout, tuning) : first_done ? steady : first;
    call.limit_ns = static_cast<std::uint64_t>(limit.count());
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

  /// Inline when the caller waits, else on the worker.
  Event submit(const Call& call, const Options& options, std::function<void()> body) {
    auto task = [this, call, after = options.after, body = std::move(body)] {
      await(after, call);
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

  std::unique_ptr<backend::Backend> backend;
  const Topology topology;
  const Tuning tuning;
  backend::Limits limits;
  const pid_t owner = ::getpid();
  std::atomic<bool> busy = false;
  std::atomic<bool> closed = false;
  std::atomic<bool> first_done = false;
  mutable std::atomic<bool> seen = false;  ///< the caller knows that, or why, the engine fails
  std::uint32_t number = protocol::kFirstEpoch;
  /// Low-latency sends whose hook has not been called, by their count of sends.
  std::deque<std::uint64_t> unreceived;
  std::uint64_t num_low_latency_sends = 0;
  bool combine_buffer_given = false;
  std::shared_ptr<Core*> self = std::make_shared<Core*>(nullptr);  ///< null once the engine is gone: hooks look
  backend::Queue queue;  ///< last: its worker ends before anything that tasks use
};

Engine::Engine(std::unique_ptr<Core> core) : core_(std::move(core)) {}
Engine::Engine(Engine&&) noexcept = default;

Engine& Engine::operator=(Engine&& other) noexcept {
  Engine old(std::move(*this));
  core_ = std::move(other.core_);
  return *this;
}

Engine::~Engine() {
  if (core_ == nullptr) return;
  // Waits of queued ops leave by the abort word; peers learn that this rank is going.
  if (!core_->closed && ::getpid() == core_->owner) {
    core_->backend->fail(Error(ErrorCode::kAborted, "the engine was destroyed without close()"));
  }
}

Engine Engine::create(const Budget& budget, const Topology& topology, const Tuning& tuning, Bootstrap& bootstrap) {
  return Engine(
      std::make_unique<Core>(backend::make_backend(budget, topology, tuning, bootstrap), budget, topology, tuning));
}

// ---- high throughput -----------------------------------------------------------------------------------------------

Handle Engine::route(const Shape& shape, const Routing& routing, StreamRef, const Options& options) {
  Core::Entry entry(*core_, "route");
  Call call = core_->next_call(Op::kRoute, options);
  core_->checked(call, options, [&] { backend::check_routing(call.op, shape, routing, core_->limits); });
  call.description[1] = static_cast<std::uint64_t>(shape.num_experts);
  call.description[2] = static_cast<std::uint64_t>(shape.top_k);

  auto state = std::make_shared<Handle::State>();
  state->num_ranks = core_->limits.num_ranks;
  state->rank = core_->limits.rank;
  state->num_experts = shape.num_experts;
  state->num_tokens = routing.experts.given() ? routing.experts.shape[0] : routing.ranks.shape[0];
  const backend::RouteCall route{routing, shape.num_experts, shape.top_k, state};
  const Event routed =
      core_->submit(call, options, [core = core_.get(), call, route] { core->backend->route(call, route); });
  state->routed = routed.state_;
  return Handle(std::move(state));
}

namespace {

/// The handle's arrays are there; a route that failed is the caller's to notice.
void await_route(const Engine::Core& core, const Call& call, const Handle::State& handle) {
  if (handle.routed == nullptr) return;
  bool there = false;
  try {
    there = core.wait_for(*handle.routed, call);
  } catch (const Error& error) {
    core.must_not_have_failed(call.op, "before_send");
    core::throw_error(ErrorCode::kState, call.op,
                      fmt::format("the handle is of a route that failed: {}", error.what()));
  }
  if (!there)
    core::throw_error(ErrorCode::kState, call.op, "the handle's route has not ended; it was made by another engine");
}

}  // namespace

Event Engine::dispatch(const Rows& x, const Handle& handle, const Rows& out, StreamRef, const Options& options) {
  Core::Entry entry(*core_, "dispatch");
  Call call = core_->next_call(Op::kDispatch, options);
  backend::DispatchCall dispatch = core_->checked(call, options, [&] {
    if (handle.state_ != nullptr && handle.state_->routed != nullptr && handle.state_->routed->done()) {
      await_route(*core_, call, *handle.state_);
    }
    return backend::check_dispatch(x, out, handle.state_, core_->limits);
  });
  std::uint64_t other_bytes = protocol::kDigestSeed;
  for (int field = core::kFieldScales; field < core::kMaxFields; ++field) {
    other_bytes = protocol::digest(other_bytes, dispatch.fields.bytes[field]);
  }
  call.description[2] = static_cast<std::uint64_t>(dispatch.top_k);
  call.description[3] = static_cast<std::uint64_t>(x.x.shape[1]);
  call.description[4] = static_cast<std::uint64_t>(x.x.dtype);
  call.description[6] = other_bytes & 0xFFFF'FFFFu;
  return core_->submit(call, options, [core = core_.get(), call, dispatch] {
    await_route(*core, call, *dispatch.handle);
    core->backend->dispatch(call, dispatch);
  });
}

Event Engine::combine(const CombineInput& in, const Handle& handle, const Rows& out, StreamRef,
                      const Options& options) {
  Core::Entry entry(*core_, "combine");
  Call call = core_->next_call(Op::kCombine, options);
  backend::CombineCall combine = core_->checked(call, options, [&] {
    if (handle.state_ != nullptr && handle.state_->routed != nullptr && handle.state_->routed->done()) {
      await_route(*core_, call, *handle.state_);
    }
    return backend::check_combine(in, out, handle.state_, core_->limits);
  });
  call.description[3] = static_cast<std::uint64_t>(combine.hidden);
  call.description[4] = static_cast<std::uint64_t>(in.x.dtype);
  call.description[6] = combine.fields.bytes[core::kFieldWeights];
  return core_->submit(call, options, [core = core_.get(), call, combine] {
    await_route(*core, call, *combine.handle);
    backend::check_rows(call.op, *combine.handle, combine.in.x);
    core->backend->combine(call, combine);
  });
}

OwnedRows Engine::make_rows(std::int64_t num_rows, const Shape& shape) {
  constexpr const char* kOp = "make_rows";
  Core::Entry entry(*core_, kOp);
  if (num_rows < 0) core::throw_argument(kOp, "num_rows", fmt::to_string(num_rows), "0 or more");
  if (shape.hidden < 1) core::throw_argument(kOp, "shape.hidden", fmt::to_string(shape.hidden), "1 or more");
  if (shape.num_scales < 0)
    core::throw_argument(kOp, "shape.num_scales", fmt::to_string(shape.num_scales), "0 or more");
  const auto row_bytes = static_cast<std::uint64_t>(shape.hidden) * size_of(shape.dtype);
  const std::uint64_t heap_bytes = core_->limits.layout.heap_bytes;
  if (num_rows > 0 && row_bytes > heap_bytes / static_cast<std::uint64_t>(num_rows)) {
    core::throw_capacity(kOp, "bytes of the window's heap (budget.rows_bytes less its rings)",
                         row_bytes > UINT64_MAX / static_cast<std::uint64_t>(num_rows)
                             ? UINT64_MAX
                             : row_bytes * static_cast<std::uint64_t>(num_rows),
                         heap_bytes, "Create the engine with a larger budget.rows_bytes.");
  }
  return OwnedRows(core_->backend->make_rows(num_rows, shape));
}

// ---- low latency ---------------------------------------------------------------------------------------------------

namespace {

void describe(Call& call, const Shape& shape, const LowLatencyOptions& options, bool exact) {
  call.description[1] = static_cast<std::uint64_t>(shape.num_experts);
  call.description[2] = static_cast<std::uint64_t>(shape.top_k);
  call.description[3] = static_cast<std::uint64_t>(shape.hidden);
  call.description[5] = static_cast<std::uint64_t>(shape.max_tokens);
  call.description[7] = static_cast<std::uint64_t>(options.wire) | (options.hook ? 8u : 0u) |
                        (options.round_scale ? 16u : 0u) | (exact ? 32u : 0u);
}

}  // namespace

/// The send now, the receive with it or in the hook.
static Pending submit_low_latency(Engine::Core& core, std::shared_ptr<backend::LowLatencyCall> op,
                                  void (backend::Backend::*send)(backend::LowLatencyCall&),
                                  void (backend::Backend::*receive)(backend::LowLatencyCall&)) {
  auto pending = std::make_shared<Pending::State>();
  if (!op->options.hook) {
    const Event event = core.submit(op->call, op->options, [&core, op, send, receive] {
      (core.backend.get()->*send)(*op);
      (core.backend.get()->*receive)(*op);
    });
    pending->receive = [event, pending_state = pending.get()] {
      const Event result = event;
      pending_state->receive = nullptr;  // the closure is gone from here on
      return result;
    };
    return Pending(std::move(pending));
  }
  const std::uint64_t sent = core.num_low_latency_sends;
  core.unreceived.push_back(sent);
  core.queue.run([&core, op, send] {
    core.await(op->options.after, op->call);
    (core.backend.get()->*send)(*op);
  });
  pending->receive = [self = core.self, op, sent, receive, pending_state = pending.get()]() -> Event {
    constexpr const char* kOp = "receive";
    if (*self == nullptr) core::throw_error(ErrorCode::kState, kOp, "the engine is gone");
    Engine::Core& alive = **self;
    Engine::Core::Entry entry(alive, kOp);
    if (alive.unreceived.empty() || alive.unreceived.front() != sent) {
      core::throw_error(ErrorCode::kState, kOp, "hooks are called in the order of their sends; an earlier one is open");
    }
    alive.unreceived.pop_front();
    // The closure owns what it still needs: dropping it must be the last step.
    const auto keep = std::exchange(pending_state->receive, nullptr);
    alive.queue.run([&alive, op, receive] {
      (alive.backend.get()->*receive)(*op);
      alive.first_done = true;
    });
    return Event();
  };
  return Pending(std::move(pending));
}

/// At most two operations in flight: all but the last one sent must have been received.
static void must_have_room_in_flight(const Engine::Core& core, const char* op) {
  if (core.unreceived.empty() || core.unreceived.front() + 2 > core.num_low_latency_sends + 1) return;
  core::throw_error(
      ErrorCode::kState, op,
      fmt::format("two low-latency operations are in flight (sends {} and {}). Call the hook of the first.",
                  core.unreceived.front(), core.num_low_latency_sends));
}

Pending Engine::low_latency_dispatch(const Shape& shape, const TensorView& x, const Routing& routing,
                                     const ExpertSlabs& out, StreamRef, const LowLatencyOptions& options) {
  Core::Entry entry(*core_, "low_latency_dispatch");
  Call call = core_->next_call(Op::kLowLatencyDispatch, options);
  core_->checked(call, options, [&] {
    must_have_room_in_flight(*core_, call.op);
    backend::check_low_latency_dispatch(shape, x, routing, out, options, core_->limits);
  });
  describe(call, shape, options, false);
  ++core_->num_low_latency_sends;
  auto op =
      std::make_shared<backend::LowLatencyCall>(backend::LowLatencyCall{call, shape, options, x, routing, out, 0, 0});
  return submit_low_latency(*core_, std::move(op), &backend::Backend::low_latency_dispatch_send,
                            &backend::Backend::low_latency_dispatch_receive);
}

Pending Engine::low_latency_combine(const Shape& shape, const ExpertSlabs& in, const Routing& routing,
                                    const TensorView& out, StreamRef, const LowLatencyOptions& options) {
  Core::Entry entry(*core_, "low_latency_combine");
  Call call = core_->next_call(Op::kLowLatencyCombine, options);
  core_->checked(call, options, [&] {
    must_have_room_in_flight(*core_, call.op);
    backend::check_low_latency_combine(shape, in, routing, out, options, core_->tuning.exact_combine, core_->limits);
    if (options.zero_copy && !core_->combine_buffer_given) {
      core::throw_error(ErrorCode::kState, call.op, "zero copy, but combine_buffer() was never asked for");
    }
  });
  describe(call, shape, options, core_->tuning.exact_combine);
  ++core_->num_low_latency_sends;
  auto op =
      std::make_shared<backend::LowLatencyCall>(backend::LowLatencyCall{call, shape, options, out, routing, in, 0, 0});
  if (options.zero_copy) op->slabs.x = core_->backend->combine_buffer(shape);
  return submit_low_latency(*core_, std::move(op), &backend::Backend::low_latency_combine_send,
                            &backend::Backend::low_latency_combine_receive);
}

TensorView Engine::combine_buffer(const Shape& shape) {
  Core::Entry entry(*core_, "combine_buffer");
  (void)low_latency_bytes_for(shape, core_->limits.num_ranks);  // checks the shape
  const TensorView view = core_->backend->combine_buffer(shape);
  core_->combine_buffer_given = true;
  return view;
}

// ---- the rest ------------------------------------------------------------------------------------------------------

Layout Engine::layout(const Shape& shape, const Routing& routing, StreamRef) {
  constexpr const char* kOp = "layout";
  Core::Entry entry(*core_, kOp);
  backend::check_routing(kOp, shape, routing, core_->limits);
  if (!routing.experts.given()) core::throw_argument(kOp, "routing.experts", "not given", "[num_tokens, top_k] ids");
  return core::count_layout(core::ExpertIds(routing.experts, shape.num_experts), shape.num_experts,
                            core_->limits.num_ranks);
}

void Engine::barrier(StreamRef) {
  Core::Entry entry(*core_, "barrier");
  Options options;
  options.wait = true;
  const Call call = core_->next_call(Op::kBarrier, options);
  core_->submit(call, options, [core = core_.get(), call] { core->backend->barrier(call); });
}

/// @throws kState without Budget::masks, kArgument for a rank that cannot be masked.
static void check_mask(const Engine::Core& core, const char* op, int rank) {
  if (!core.limits.budget.masks) core::throw_error(ErrorCode::kState, op, "the budget does not allow masks");
  if (rank < 0 || rank >= core.limits.num_ranks || rank == core.limits.rank) {
    core::throw_argument(op, "rank", fmt::to_string(rank),
                         fmt::format("0..{}, not this rank {}", core.limits.num_ranks - 1, core.limits.rank));
  }
}

void Engine::masks(const TensorView& out, StreamRef) {
  Core::Entry entry(*core_, "masks");
  if (!core_->limits.budget.masks) core::throw_error(ErrorCode::kState, "masks", "the budget does not allow masks");
  const backend::Argument argument{"masks", "out", out};
  argument.must_have_dtype({DType::kI32});
  argument.must_have_shape({core_->limits.num_ranks});
  argument.must_be_dense();
  argument.must_have_memory();
  const std::vector<int> masks = core_->backend->masks();
  std::copy(masks.begin(), masks.end(), out.as<std::int32_t>());
}

void Engine::mask(int rank, StreamRef) {
  Core::Entry entry(*core_, "mask");
  check_mask(*core_, "mask", rank);
  core_->backend->mask(rank);
}

void Engine::unmask(int rank, StreamRef) {
  Core::Entry entry(*core_, "unmask");
  check_mask(*core_, "unmask", rank);
  core_->backend->unmask(rank);
}

TensorView Engine::memory(Mode mode, std::size_t offset, std::size_t bytes) {
  Core::Entry entry(*core_, "memory");
  return core_->backend->memory(mode, offset, bytes);
}

void Engine::check() const {
  if (core_->closed) core::throw_error(ErrorCode::kState, "check", "the engine is closed");
  core_->must_not_have_failed("check", "between");
}

void Engine::abandon(const std::string& why) noexcept {
  if (core_ == nullptr || core_->closed) return;
  Error error(ErrorCode::kAborted, why);
  error.rank = core_->limits.rank;
  core_->seen = true;
  core_->backend->fail(error);
}

void Engine::close() {
  if (core_ == nullptr || core_->closed) return;
  if (::getpid() != core_->owner) {
    core::throw_error(ErrorCode::kState, "close", "the engine belongs to the process that made it");
  }
  const auto limit = core::scaled(core_->tuning.timeout, core_->tuning);
  const bool idle = core_->queue.drain(static_cast<std::uint64_t>(limit.count()));
  if (!idle) core_->backend->fail(Error(ErrorCode::kTimeout, "close: an operation was still in flight"));
  const std::vector<int> missing = core_->backend->close();
  core_->closed = true;
  if (idle) core_->must_not_hide_an_error();
  if (idle && missing.empty()) return;
  Error error(
      ErrorCode::kTimeout,
      idle ? fmt::format("close: no closing word from rank {} within {:.1f} s; everything local is released",
                         fmt::join(missing, ", "),
                         static_cast<double>(core::scaled(core_->tuning.close_timeout, core_->tuning).count()) * 1e-9)
           : std::string("close: an operation was still in flight at the limit; the engine has failed"));
  error.op = "close";
  error.phase = "close";
  error.rank = core_->limits.rank;
  error.peers = missing;
  throw error;
}

int Engine::rank() const {
  return core_->limits.rank;
}
int Engine::num_ranks() const {
  return core_->limits.num_ranks;
}
const Topology& Engine::topology() const {
  return core_->topology;
}
std::uint64_t Engine::ids_out_of_range() const {
  return core_->backend->ids_out_of_range();
}

}  // namespace anyep
