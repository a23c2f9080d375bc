// Low latency: what a send may find in flight, hooks in the order of their sends.
#include <anyep/engine.h>
#include <fmt/format.h>

#include <memory>
#include <utility>

#include "backend/engine_core.h"
#include "core/check.h"

namespace anyep {

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
    pending->receive = [event, pending_state = pending.get()](StreamRef stream) {
      const Event result = event;
      if (stream.native != nullptr) result.make_wait(stream);
      pending_state->receive = nullptr;  // the closure is gone from here on
      return result;
    };
    return Pending(std::move(pending));
  }
  const std::uint64_t sent = core.num_low_latency_sends;
  core.unreceived.push_back(sent);
  if (core.limits.on_device) {
    Options sending;
    sending.after = op->options.after;
    sending.wait = false;
    // Recorded like any op: a hook on another stream waits for it.
    (void)core.submit_to_stream(op->call, sending, [&] { (core.backend.get()->*send)(*op); });
  } else {
    core.queue.run([&core, op, send] {
      core.await_or_refuse(op->options.after, op->call);
      (core.backend.get()->*send)(*op);
    });
  }
  pending->receive = [self = core.self, op, sent, receive, pending_state = pending.get()](StreamRef stream) -> Event {
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
    if (alive.limits.on_device) {
      op->call.stream = stream;
      return alive.submit_to_stream(op->call, {}, [&] { (alive.backend.get()->*receive)(*op); });
    }
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
                                     const ExpertSlabs& out, StreamRef stream, const LowLatencyOptions& options) {
  Core::Entry entry(*core_, "low_latency_dispatch");
  Call call = core_->next_call(Op::kLowLatencyDispatch, stream, options);
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
                                    const TensorView& out, StreamRef stream, const LowLatencyOptions& options) {
  Core::Entry entry(*core_, "low_latency_combine");
  Call call = core_->next_call(Op::kLowLatencyCombine, stream, options);
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

}  // namespace anyep
