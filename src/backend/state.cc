#include "backend/state.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "core/check.h"
#include "core/layout.h"
#include "core/limits.h"

namespace anyep {

// ---- events --------------------------------------------------------------------------------------------------------

void Event::State::finish(const Error* error) noexcept {
  std::vector<std::function<void()>> then;
  {
    const std::lock_guard lock(mutex_);
    if (done_) return;
    done_ = true;
    if (error != nullptr) error_.emplace(*error);
    then.swap(then_);
  }
  changed_.notify_all();
  for (const auto& each : then) each();
}

void Event::State::when_done(std::function<void()> then) const {
  {
    const std::lock_guard lock(mutex_);
    if (!done_) {
      then_.push_back(std::move(then));
      return;
    }
  }
  then();
}

bool Event::State::done() const noexcept {
  const std::lock_guard lock(mutex_);
  return done_;
}

bool Event::State::wait_for(std::uint64_t limit) const {
  std::unique_lock lock(mutex_);
  const auto is_done = [this] { return done_; };
  if (!changed_.wait_for(lock, std::chrono::nanoseconds(limit), is_done)) return false;
  if (error_) throw Error(*error_);
  return true;
}

void Event::State::wait() const {
  if (limit_ns != 0) {
    if (wait_for(limit_ns)) return;
    Error error(ErrorCode::kTimeout, fmt::format("{}: the event was not completed within {:.1f} s", op,
                                                 static_cast<double>(limit_ns) * 1e-9));
    error.op = op;
    error.limit_ns = limit_ns;
    throw error;
  }
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return done_; });
  if (error_) throw Error(*error_);
}

Event::Event() = default;
Event::Event(std::shared_ptr<State> state) : state_(std::move(state)) {}

void Event::make_wait(StreamRef stream) const {
  if (state_ != nullptr) state_->make_wait(stream);
}

void Event::wait() const {
  if (state_ != nullptr) state_->wait();
}

bool Event::done() const noexcept {
  return state_ == nullptr || state_->done();
}

Event Event::manual() {
  auto state = std::make_shared<State>();
  state->limit_ns = static_cast<std::uint64_t>(Tuning{}.startup_timeout.count());
  return Event(std::move(state));
}

void Event::complete() const {
  if (state_ != nullptr) state_->finish(nullptr);
}

// ---- pending -------------------------------------------------------------------------------------------------------

Pending::Pending(std::shared_ptr<State> state) : state_(std::move(state)) {}
Pending::Pending(Pending&&) noexcept = default;
Pending& Pending::operator=(Pending&&) noexcept = default;
Pending::~Pending() = default;

Event Pending::receive(StreamRef stream) {
  if (state_ == nullptr || !state_->receive) {
    core::throw_error(ErrorCode::kState, "receive", "this operation was already received");
  }
  return state_->receive(stream);
}

// ---- rows ----------------------------------------------------------------------------------------------------------

OwnedRows::OwnedRows() = default;
OwnedRows::OwnedRows(std::unique_ptr<State> state) : state_(std::move(state)) {}
OwnedRows::OwnedRows(OwnedRows&&) noexcept = default;
OwnedRows& OwnedRows::operator=(OwnedRows&&) noexcept = default;
OwnedRows::~OwnedRows() = default;

const Rows& OwnedRows::view() const {
  ANYEP_CHECK(state_ != nullptr, "view() of rows that were moved from");
  return state_->rows;
}
std::int64_t OwnedRows::num_rows() const {
  return state_ == nullptr ? 0 : state_->num_rows;
}

void OwnedRows::keep_front(std::int64_t num_rows) {
  ANYEP_CHECK(state_ != nullptr, "keep_front() of rows that were moved from");
  if (num_rows < 0 || num_rows > state_->num_rows) {
    core::throw_argument("keep_front", "num_rows", fmt::to_string(num_rows),
                         fmt::format("0..{}, the rows there are", state_->num_rows));
  }
  for (TensorView* const view : {&state_->rows.x, &state_->rows.scales, &state_->rows.experts, &state_->rows.weights}) {
    if (view->given()) view->shape[0] = num_rows;
  }
  state_->num_rows = num_rows;
  if (state_->keep_front) state_->keep_front(num_rows);
}

// ---- handle --------------------------------------------------------------------------------------------------------

Handle::Handle() = default;
Handle::Handle(std::shared_ptr<State> state) : state_(std::move(state)) {}
Handle::Handle(Handle&&) noexcept = default;
Handle& Handle::operator=(Handle&&) noexcept = default;
Handle::~Handle() = default;

namespace {

constexpr const char* kAdopt = "Handle::adopt";

std::vector<std::int32_t> copy_int32(const char* name, const TensorView& view, const Extents& shape) {
  const auto text = [](const Extents& extents) {
    return fmt::format("[{}]", fmt::join(extents.at.begin(), extents.at.begin() + extents.dims, ", "));
  };
  if (view.dtype != DType::kI32) core::throw_argument(kAdopt, name, name_of(view.dtype), "int32");
  if (view.shape != shape) core::throw_argument(kAdopt, name, text(view.shape), text(shape));
  const bool column = shape.dims == 1;
  if (!column && !view.is_dense()) core::throw_argument(kAdopt, name, "a view with gaps", "a dense array");
  std::vector<std::int32_t> values(static_cast<std::size_t>(view.num_elements()));
  if (!values.empty() && view.data == nullptr) core::throw_argument(kAdopt, name, "a null pointer", "memory");
  const auto* from = view.as<const std::int32_t>();
  for (std::int32_t& value : values) {
    value = *from;
    from += column ? view.strides[0] : 1;
  }
  return values;
}

[[noreturn]] void refuse(const char* name, std::int64_t got, const std::string& allowed) {
  core::throw_argument(kAdopt, name, fmt::to_string(got), allowed);
}

/// Every value in range, sums that fit together: what dispatch and combine rely on.
void check_arrays(const Handle::State& state) {
  std::int64_t before = 0;
  for (int s = 0; s < state.num_ranks; ++s) {
    const auto index = static_cast<std::size_t>(s);
    const std::int64_t until = state.rows_until[index];
    const std::int64_t tokens = state.tokens[index];
    if (tokens < 0) refuse("tokens", tokens, "0 or more");
    if (until < before || until - before > tokens) {
      refuse("rows_until", until, fmt::format("{}..{} for source {}", before, before + tokens, s));
    }
    std::int64_t last = -1;
    for (std::int64_t row = before; row < until; ++row) {
      const std::int64_t token = state.source[static_cast<std::size_t>(row)];
      if (token <= last || token >= tokens)
        refuse("source", token, fmt::format("ascending below {} in source {}", tokens, s));
      last = token;
    }
    before = until;
  }
  std::vector<std::int64_t> last(static_cast<std::size_t>(state.num_ranks), -1);
  for (std::size_t at = 0; at < state.place.size(); ++at) {
    std::int64_t& previous = last[at % last.size()];
    const std::int64_t row = state.place[at];
    if (row == -1) continue;
    if (row < 0 || (previous >= 0 && row != previous + 1)) {
      refuse("place", row, "-1, or rows that ascend by one down each column");
    }
    previous = row;
  }
  const auto me = static_cast<std::size_t>(state.rank);
  std::int64_t own_rows = 0;
  for (std::size_t at = me; at < state.place.size(); at += last.size()) {
    if (state.place[at] < 0) continue;
    if (state.place[at] != state.first_row(state.rank) + own_rows) {
      refuse("place", state.place[at], "this rank's own rows start where its range in rows_until does");
    }
    ++own_rows;
  }
  if (own_rows != state.last_row(state.rank) - state.first_row(state.rank)) {
    refuse("place", own_rows, "as many own rows as rows_until says");
  }
}

const Handle::State& ready(const std::shared_ptr<Handle::State>& state) {
  if (state == nullptr) core::throw_error(ErrorCode::kState, "handle", "this handle is empty or was moved from");
  if (state->routed != nullptr) state->routed->wait();
  return *state;
}

TensorView view_of(const std::vector<std::int32_t>& values, const Extents& shape) {
  return TensorView::dense(values.data(), DType::kI32, shape);
}

}  // namespace

Handle Handle::adopt(int num_ranks, int rank, const HandleArrays& arrays) {
  if (num_ranks < 1) core::throw_argument(kAdopt, "num_ranks", fmt::to_string(num_ranks), "1 or more");
  if (rank < 0 || rank >= num_ranks) {
    core::throw_argument(kAdopt, "rank", fmt::to_string(rank), fmt::format("0..{}", num_ranks - 1));
  }
  auto state = std::make_shared<State>();
  state->num_ranks = num_ranks;
  state->rank = rank;
  state->rows_until = copy_int32("rows_until", arrays.rows_until, {num_ranks});
  state->tokens = copy_int32("tokens", arrays.tokens, {num_ranks});
  state->num_tokens = state->tokens[static_cast<std::size_t>(rank)];
  if (state->num_tokens < 0) refuse("tokens", state->num_tokens, "0 or more");
  if (state->num_rows() < 0) refuse("rows_until", state->num_rows(), "0 or more");
  state->place = copy_int32("place", arrays.place, {state->num_tokens, num_ranks});
  state->source = copy_int32("source", arrays.source, {state->num_rows()});
  check_arrays(*state);
  return Handle(std::move(state));
}

std::int64_t Handle::num_rows() const {
  return ready(state_).num_rows();
}
bool Handle::has_counts() const noexcept {
  return state_ != nullptr && (state_->routed == nullptr || state_->routed->done());
}
std::int64_t Handle::num_tokens() const {
  return state_ == nullptr ? 0 : state_->num_tokens;
}
int Handle::num_ranks() const {
  return state_ == nullptr ? 0 : state_->num_ranks;
}
int Handle::rank() const {
  return state_ == nullptr ? 0 : state_->rank;
}

std::span<const std::int64_t> Handle::pairs_per_expert() const {
  return ready(state_).pairs_per_expert;
}

std::vector<std::int64_t> Handle::aligned_pairs_per_expert(std::int64_t alignment) const {
  if (alignment < 1) {
    core::throw_argument("aligned_pairs_per_expert", "alignment", fmt::to_string(alignment), "1 or more");
  }
  std::vector<std::int64_t> aligned(pairs_per_expert().begin(), pairs_per_expert().end());
  for (std::int64_t& pairs : aligned) pairs = (pairs + alignment - 1) / alignment * alignment;
  return aligned;
}

TensorView Handle::rows_until() const {
  if (state_ != nullptr && state_->device != nullptr) return state_->device->rows_until();
  const State& state = ready(state_);
  return view_of(state.rows_until, {state.num_ranks});
}
TensorView Handle::place() const {
  if (state_ != nullptr && state_->device != nullptr) return state_->device->place();
  const State& state = ready(state_);
  return view_of(state.place, {state.num_tokens, state.num_ranks});
}
TensorView Handle::source() const {
  if (state_ != nullptr && state_->device != nullptr) return state_->device->source();
  const State& state = ready(state_);
  return view_of(state.source, {state.num_rows()});
}
TensorView Handle::tokens() const {
  if (state_ != nullptr && state_->device != nullptr) return state_->device->tokens();
  const State& state = ready(state_);
  return view_of(state.tokens, {state.num_ranks});
}

}  // namespace anyep
