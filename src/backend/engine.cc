// The engine's life, high throughput, and what is local.
#include <anyep/engine.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>

#include "backend/engine_core.h"
#include "core/check.h"
#include "core/fault_point.h"
#include "core/tuning.h"

namespace anyep {

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
  try {
    return Engine(
        std::make_unique<Core>(backend::make_backend(budget, topology, tuning, bootstrap), budget, topology, tuning));
  } catch (const std::bad_alloc&) {
    core::throw_error(ErrorCode::kResource, "create", "out of memory");
  }
}

// ---- high throughput -----------------------------------------------------------------------------------------------

backend::RouteCall Engine::Core::checked_route(Call& call, const Shape& shape, const Routing& routing,
                                               const Options& options) {
  checked(call, options, [&] { backend::check_routing(call.op, shape, routing, limits); });
  call.description[1] = static_cast<std::uint64_t>(shape.num_experts);
  call.description[2] = static_cast<std::uint64_t>(shape.top_k);
  auto state = std::make_shared<Handle::State>();
  state->num_ranks = limits.num_ranks;
  state->rank = limits.rank;
  state->num_experts = shape.num_experts;
  state->num_tokens = routing.experts.given() ? routing.experts.shape[0] : routing.ranks.shape[0];
  return {routing, shape.num_experts, shape.top_k, std::move(state)};
}

Event Engine::Core::submit_route(const Call& call, const backend::RouteCall& route, const Options& options) {
  Event routed = submit(call, options, [this, call, route] { backend->route(call, route); });
  if (route.handle->device == nullptr) route.handle->routed = routed.state_;
  return routed;
}

Handle Engine::route(const Shape& shape, const Routing& routing, StreamRef stream, const Options& options) {
  Core::Entry entry(*core_, "route");
  Call call = core_->next_call(Op::kRoute, stream, options);
  const backend::RouteCall route = core_->checked_route(call, shape, routing, options);
  (void)core_->submit_route(call, route, options);
  return Handle(route.handle);
}

void Engine::Core::await_route(const Call& call, const Handle::State& handle) const {
  if (handle.routed == nullptr) return;
  if (limits.on_device && !handle.routed->done()) return;  // the stream waits; counts are read where they are needed
  bool there = false;
  try {
    there = wait_for(*handle.routed, call);
  } catch (const Error& error) {
    must_not_have_failed(call.op, "before_send");
    core::throw_error(ErrorCode::kState, call.op,
                      fmt::format("the handle is of a route that failed: {}", error.what()));
  }
  if (!there)
    core::throw_error(ErrorCode::kState, call.op, "the handle's route has not ended; it was made by another engine");
}

backend::DispatchCall Engine::Core::checked_dispatch(Call& call, const Rows& x,
                                                     const std::shared_ptr<Handle::State>& handle, const Rows& out) {
  if (handle != nullptr && handle->routed != nullptr && handle->routed->done()) await_route(call, *handle);
  backend::DispatchCall dispatch = backend::check_dispatch(x, out, handle, limits);
  std::uint64_t other_bytes = protocol::kDigestSeed;
  for (int field = core::kFieldScales; field < core::kMaxFields; ++field) {
    other_bytes = protocol::digest(other_bytes, dispatch.fields.bytes[field]);
  }
  call.description[2] = static_cast<std::uint64_t>(dispatch.top_k);
  call.description[3] = static_cast<std::uint64_t>(x.x.shape[1]);
  call.description[4] = static_cast<std::uint64_t>(x.x.dtype);
  call.description[6] = other_bytes & 0xFFFF'FFFFu;
  return dispatch;
}

Event Engine::dispatch(const Rows& x, const Handle& handle, const Rows& out, StreamRef stream, const Options& options) {
  Core::Entry entry(*core_, "dispatch");
  Call call = core_->next_call(Op::kDispatch, stream, options);
  const backend::DispatchCall dispatch =
      core_->checked(call, options, [&] { return core_->checked_dispatch(call, x, handle.state_, out); });
  return core_->submit(call, options, [core = core_.get(), call, dispatch] {
    core->await_route(call, *dispatch.handle);
    core->backend->dispatch(call, dispatch);
  });
}

Event Engine::combine(const CombineInput& in, const Handle& handle, const Rows& out, StreamRef stream,
                      const Options& options) {
  Core::Entry entry(*core_, "combine");
  Call call = core_->next_call(Op::kCombine, stream, options);
  backend::CombineCall combine = core_->checked(call, options, [&] {
    if (handle.state_ != nullptr && handle.state_->routed != nullptr && handle.state_->routed->done()) {
      core_->await_route(call, *handle.state_);
    }
    return backend::check_combine(in, out, handle.state_, core_->limits);
  });
  call.description[3] = static_cast<std::uint64_t>(combine.hidden);
  call.description[4] = static_cast<std::uint64_t>(in.x.dtype);
  call.description[6] = combine.fields.bytes[core::kFieldWeights];
  return core_->submit(call, options, [core = core_.get(), call, combine] {
    core->await_route(call, *combine.handle);
    if (!core->limits.on_device) backend::check_rows(call.op, *combine.handle, combine.in.x);
    core->backend->combine(call, combine);
  });
}

OwnedRows Engine::make_rows(std::int64_t num_rows, const Shape& shape, StreamRef stream) {
  constexpr const char* kOp = "make_rows";
  Core::Entry entry(*core_, kOp);
  if (num_rows < 0) core::throw_argument(kOp, "num_rows", fmt::to_string(num_rows), "0 or more");
  if (shape.hidden < 1) core::throw_argument(kOp, "shape.hidden", fmt::to_string(shape.hidden), "1 or more");
  if (shape.num_scales < 0)
    core::throw_argument(kOp, "shape.num_scales", fmt::to_string(shape.num_scales), "0 or more");
  const auto row_bytes = static_cast<std::uint64_t>(shape.hidden) * size_of(shape.dtype);
  const std::uint64_t heap_bytes = core_->limits.on_device ? UINT64_MAX : core_->limits.layout.heap_bytes;
  if (num_rows > 0 && row_bytes > heap_bytes / static_cast<std::uint64_t>(num_rows)) {
    core::throw_capacity(kOp, "bytes of the window's heap (budget.rows_bytes less its rings)",
                         row_bytes > UINT64_MAX / static_cast<std::uint64_t>(num_rows)
                             ? UINT64_MAX
                             : row_bytes * static_cast<std::uint64_t>(num_rows),
                         heap_bytes, "Create the engine with a larger budget.rows_bytes.");
  }
  return OwnedRows(core_->backend->make_rows_on(num_rows, shape, stream));
}
// ---- the rest ------------------------------------------------------------------------------------------------------

namespace {

/// A dense array of the caller's.
void check_array(const char* op, const char* name, const TensorView& view, std::initializer_list<DType> dtypes,
                 const Extents& extents) {
  const backend::Argument argument{op, name, view};
  argument.must_have_dtype(dtypes);
  argument.must_have_shape(extents);
  argument.must_be_dense();
  argument.must_have_memory();
}

void check_layout(const Shape& shape, const Routing& routing, const backend::Limits& limits) {
  constexpr const char* kOp = "layout";
  backend::check_routing(kOp, shape, routing, limits);
  if (!routing.experts.given()) core::throw_argument(kOp, "routing.experts", "not given", "[num_tokens, top_k] ids");
}

}  // namespace

Layout Engine::layout(const Shape& shape, const Routing& routing, StreamRef stream) {
  Core::Entry entry(*core_, "layout");
  check_layout(shape, routing, core_->limits);
  return core_->backend->layout(shape, routing, stream);
}

void Engine::layout(const Shape& shape, const Routing& routing, const LayoutArrays& out, StreamRef stream) {
  constexpr const char* kOp = "layout";
  Core::Entry entry(*core_, kOp);
  check_layout(shape, routing, core_->limits);
  check_array(kOp, "out.tokens_per_rank", out.tokens_per_rank, {DType::kI32}, {core_->limits.num_ranks});
  check_array(kOp, "out.pairs_per_expert", out.pairs_per_expert, {DType::kI32}, {shape.num_experts});
  check_array(kOp, "out.token_in_rank", out.token_in_rank, {DType::kBool, DType::kU8},
              {routing.experts.shape[0], core_->limits.num_ranks});
  core_->launch([&] { core_->backend->layout_into(shape, routing, out, stream); });
}

Handle Engine::adopt(const HandleArrays& arrays, std::shared_ptr<const void> owner, StreamRef stream) {
  constexpr const char* kOp = "adopt";
  Core::Entry entry(*core_, kOp);
  const int ranks = core_->limits.num_ranks;
  check_array(kOp, "rows_until", arrays.rows_until, {DType::kI32}, {ranks});
  check_array(kOp, "place", arrays.place, {DType::kI32}, {-1, ranks});
  check_array(kOp, "source", arrays.source, {DType::kI32}, {-1});
  check_array(kOp, "tokens", arrays.tokens, {DType::kI32}, {ranks});
  return Handle(core_->backend->adopt(arrays, std::move(owner), stream));
}

void Engine::barrier(StreamRef stream) {
  Core::Entry entry(*core_, "barrier");
  Options options;
  options.wait = !core_->limits.on_device;
  const Call call = core_->next_call(Op::kBarrier, stream, options);
  core_->submit(call, options, [core = core_.get(), call] { core->backend->barrier(call); });
}

void Engine::refuse(Op op, const std::string& why) {
  Core::Entry entry(*core_, name_of(op));
  (void)core_->refused(core_->next_call(op, {}, {}), Error(ErrorCode::kArgument, why));
}

/// @throws kState without Budget::masks, kArgument for a rank that cannot be masked.
static void check_mask(const Engine::Core& core, const char* op, int rank) {
  if (!core.limits.budget.masks) core::throw_error(ErrorCode::kState, op, "the budget does not allow masks");
  if (rank < 0 || rank >= core.limits.num_ranks || rank == core.limits.rank) {
    core::throw_argument(op, "rank", fmt::to_string(rank),
                         fmt::format("0..{}, not this rank {}", core.limits.num_ranks - 1, core.limits.rank));
  }
}

void Engine::masks(const TensorView& out, StreamRef stream) {
  Core::Entry entry(*core_, "masks");
  if (!core_->limits.budget.masks) core::throw_error(ErrorCode::kState, "masks", "the budget does not allow masks");
  check_array("masks", "out", out, {DType::kI32}, {core_->limits.num_ranks});
  core_->backend->copy_masks(out, stream);
}

void Engine::mask(int rank, StreamRef) {
  Core::Entry entry(*core_, "mask");
  check_mask(*core_, "mask", rank);
  core_->backend->mask(rank);
}

void Engine::unmask(int rank, StreamRef) {
  Core::Entry entry(*core_, "unmask");
  check_mask(*core_, "unmask", rank);
  // Behind the ops in the queue: the agreement is about a turn that this rank has not begun.
  core_->queue.run([core = core_.get(), rank] { core->backend->unmask(rank); });
}

TensorView Engine::memory(Mode mode, std::size_t offset, std::size_t bytes) {
  Core::Entry entry(*core_, "memory");
  return core_->backend->memory(mode, offset, bytes);
}

std::shared_ptr<const void> Engine::hold_memory() {
  Core::Entry entry(*core_, "hold_memory");
  return core_->backend->hold_memory();
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
  if (core_->closing.exchange(true)) {  // from here on no other call begins
    if (core_->closed) return;
    core::throw_error(ErrorCode::kState, "close", "another thread is closing this engine");
  }
  const auto limit = core::scaled(core_->tuning.timeout, core_->tuning);
  const bool idle = core_->becomes_quiet(limit);
  if (!idle) {
    core_->backend->fail(Error(ErrorCode::kTimeout, "close: an operation was still in flight"));
    // It leaves at its next wait. Until then it uses the memory that is about to be released.
    while (!core_->becomes_quiet(limit)) {
    }
  }
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
