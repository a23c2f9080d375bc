// How a group fails, masks and ends: everything that the watcher or an error starts.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "core/check.h"
#include "core/fault_point.h"
#include "core/log.h"
#include "core/tuning.h"
#include "host/group.h"

namespace anyep::host {

control::Message message_of(std::uint32_t kind, std::uint16_t generation, std::uint64_t a, std::uint64_t b,
                            std::string_view text) {
  control::Message message;
  message.kind = kind;
  message.generation = generation;
  message.a = a;
  message.b = b;
  const std::size_t length = std::min(text.size(), sizeof(message.text) - 1);
  std::memcpy(message.text, text.data(), length);
  return message;
}

namespace {

std::string_view text_of(const control::Message& message) {
  return {message.text, ::strnlen(message.text, sizeof(message.text))};
}

/// In the code of a leaving message: the sender passes on what another rank has told. It blames whom that one blames.
constexpr std::uint64_t kPassedOn = std::uint64_t{1} << 32;

std::uint64_t bits_of(const std::vector<int>& ranks) {
  std::uint64_t bits = 0;
  for (const int rank : ranks) bits |= rank >= 0 && rank < 64 ? std::uint64_t{1} << rank : 0;
  return bits;
}

ErrorCode code_from(std::uint64_t value) {
  return value <= static_cast<std::uint64_t>(ErrorCode::kInternal) ? static_cast<ErrorCode>(value)
                                                                   : ErrorCode::kAborted;
}

/// Whom the news that `peer` leaves blames, as a bit mask: whom the peer blames; else the peer itself. Of a disagreement
/// both sides.
std::uint64_t blamed_by(int peer, const control::Message& message) {
  const bool first_hand = (message.a & kPassedOn) == 0;
  const bool is_side = first_hand && code_from(message.a & ~kPassedOn) == ErrorCode::kMismatch;
  return message.b == 0 || is_side ? message.b | bits_of({peer}) : message.b;
}

/// What this rank throws when `peer` says that it leaves: death, silence and disagreement keep their class. It blames
/// itself only where it was silent.
Error relayed(int rank, int peer, const control::Message& message) {
  const ErrorCode theirs = code_from(message.a & ~kPassedOn);
  const bool keeps = theirs == ErrorCode::kMismatch || theirs == ErrorCode::kTimeout || theirs == ErrorCode::kPeerDead;
  const bool first_hand = (message.a & kPassedOn) == 0;
  Error error(keeps ? theirs : ErrorCode::kAborted,
              first_hand ? fmt::format("rank {} leaves: {}", peer, text_of(message)) : std::string(text_of(message)));
  error.rank = rank;
  const std::uint64_t blamed = blamed_by(peer, message);
  for (int one = 0; one < 64; ++one) {
    if ((one != rank || theirs == ErrorCode::kTimeout) && (blamed >> one & 1u) != 0) error.peers.push_back(one);
  }
  if (error.peers.empty()) error.peers.push_back(peer);
  return error;
}

}  // namespace

void Group::wake_own() noexcept {
  protocol::ring(doorbell(rank_));
  changed_.notify_all();
}

void Group::take_error(const Error& error, bool tell) noexcept {
  {
    const std::lock_guard lock(mutex_);
    if (first_error_) return;
    first_error_ = error;
  }
  protocol::Shared(*abort_word()).store(1, protocol::kRelease);
  if (tell) {
    control_->tell_all(message_of(kMessageLeaving, generation_, static_cast<std::uint64_t>(error.code),
                                  bits_of(error.peers), error.what()));
  }
  wake_own();
}

void Group::fail(const Error& error) noexcept {
  take_error(error, true);
}

/// The error that is repeated names every rank that died, whichever was noticed first.
void Group::take_death(int peer, const char* how) noexcept {
  Error error(ErrorCode::kPeerDead, fmt::format("rank {} died (noticed by its {})", peer, how));
  error.rank = rank_;
  error.peers = {peer};
  take_error(error, true);
  const std::lock_guard lock(mutex_);
  std::vector<int>& named = first_error_->peers;
  if (first_error_->code != ErrorCode::kPeerDead || std::ranges::count(named, peer) != 0) return;
  first_error_ = core::reworded(*first_error_, fmt::format("{}; {}", first_error_->what(), error.what()));
  first_error_->peers.push_back(peer);
  std::ranges::sort(first_error_->peers);
}

std::optional<Error> Group::first_error() const {
  const std::lock_guard lock(mutex_);
  return first_error_;
}

bool Group::wait_until_failed(std::uint64_t limit_ns) const {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, std::chrono::nanoseconds(limit_ns), [this] { return first_error_.has_value(); });
}

bool Group::failed() const {
  return protocol::Shared(*abort_word()).load(protocol::kAcquire) != 0;
}

void Group::refused(std::uint32_t call, const Error& error) noexcept {
  forget_refusals(call);
  control_->tell_all(
      message_of(kMessageRefused, generation_, call, static_cast<std::uint64_t>(error.code), error.what()));
}

void Group::forget_refusals(std::uint32_t call) noexcept {
  const std::lock_guard lock(mutex_);
  refused_call_ = call;
  std::erase_if(refusals_, [call](const Refusal& one) { return !protocol::not_before(one.call, call + 1); });
}

void Group::begin_call(std::uint32_t call) noexcept {
  {
    const std::lock_guard lock(mutex_);
    running_since_ = call;
  }
  begin_call_right_behind(call);
}

void Group::begin_call_right_behind(std::uint32_t call) noexcept {
  std::optional<Error> refusal;
  {
    const std::lock_guard lock(mutex_);
    running_call_ = call;
    for (const Refusal& one : refusals_) {
      if (one.call == call) refusal = one.error;
    }
  }
  if (refusal) take_error(*refusal, true);
}

void Group::on_message(int peer, const control::Message& message) noexcept {
  if (message.generation != generation_) return;
  const auto at = static_cast<std::size_t>(peer);
  switch (message.kind) {
    case kMessageClosing: {
      const std::lock_guard lock(mutex_);
      closing_[at] = ended_[at] = 1;
      break;
    }
    case kMessageLeaving: {
      std::optional<Error> reason;
      {
        const std::lock_guard lock(mutex_);
        ended_[at] = 1;
        for (const Refusal& one : refusals_) {
          if (one.error.peers.front() == peer) reason = one.error;  // why it leaves, better than that it does
        }
      }
      if (budget_.masks) {
        set_mask(peer, true);
      } else {
        const Error error = reason ? *reason : relayed(rank_, peer, message);
        const bool is_news = !failed();
        take_error(error, false);
        // Passed on: the first one may be gone before everybody has heard it. The blame stays, this rank's share too.
        if (is_news) {
          control_->tell_all(message_of(kMessageLeaving, generation_,
                                        static_cast<std::uint64_t>(error.code) | kPassedOn,
                                        reason ? bits_of(error.peers) : blamed_by(peer, message), error.what()));
        }
      }
      break;
    }
    case kMessageRefused: {
      Error error(ErrorCode::kAborted, fmt::format("rank {} refused the call: {}", peer, text_of(message)));
      error.rank = rank_;
      error.peers = {peer};
      const auto call = static_cast<std::uint32_t>(message.a);
      bool running = false;
      {
        const std::lock_guard lock(mutex_);
        // Of a call that this rank has refused too: not to be taken, later, for why the peer leaves.
        if (refused_call_ && !protocol::not_before(call, *refused_call_ + 1)) break;
        refusals_.push_back({call, error});
        running = protocol::not_before(call, running_since_) && protocol::not_before(running_call_, call);
      }
      if (running) take_error(error, true);
      break;
    }
    case kMessageUnmask:
    case kMessageUnmaskOffer:
    case kMessageUnmaskConfirm:
    case kMessageUnmaskDone:
    case kMessageUnmaskOff:
      on_readmission(peer, message);
      break;
    default:
      core::log_warning(fmt::format("rank {} sent a message of unknown kind {}", peer, message.kind));
  }
  if (message.kind == kMessageClosing || message.kind == kMessageLeaving) set_gone(peer, kLeft);
  wake_own();
}

// Masks and errors come before `gone`: whoever finds a peer gone must find out why.
void Group::on_death(int peer, const char* how) noexcept {
  const auto at = static_cast<std::size_t>(peer);
  bool closed = false;
  {
    const std::lock_guard lock(mutex_);
    closed = closing_[at] != 0;
    ended_[at] = 1;
  }
  if (budget_.masks) {
    set_mask(peer, true);
    core::log_warning(fmt::format("rank {} died ({}); low latency goes on without it", peer, how));
  } else if (!closed) {
    take_death(peer, how);
  }
  set_gone(peer, kDead);
  wake_own();
}

void Group::on_hangup(int peer) noexcept {
  const auto at = static_cast<std::size_t>(peer);
  bool announced = false;
  {
    const std::lock_guard lock(mutex_);
    announced = ended_[at] != 0;
    ended_[at] = 1;
  }
  if (budget_.masks) {
    set_mask(peer, true);
  } else if (!announced) {
    Error error(ErrorCode::kAborted, fmt::format("rank {} closed its links without a word", peer));
    error.rank = rank_;
    error.peers = {peer};
    take_error(error, true);
  }
  set_gone(peer, kLeft);
  wake_own();
}

/// A rank that left and died later has left.
void Group::set_gone(int peer, Gone how) noexcept {
  const protocol::Shared gone(this->gone()[peer]);
  if (gone.load(protocol::kRelaxed) == kHere) gone.store(how, protocol::kRelease);
}

std::vector<int> Group::close() {
  core::fault_point("close", rank_, 0);
  control_->tell_all(message_of(kMessageClosing, generation_, 0, 0, ""));
  const auto limit = core::scaled(tuning_.close_timeout, tuning_);
  std::vector<int> missing;
  if (!failed()) {  // after a failure the peers have been told, and nobody is waited for
    std::unique_lock lock(mutex_);
    const auto everybody = [&] {
      for (int peer = 0; peer < num_ranks(); ++peer) {
        if (peer != rank_ && ended_[static_cast<std::size_t>(peer)] == 0) return false;
      }
      return true;
    };
    changed_.wait_for(lock, limit, everybody);
    for (int peer = 0; peer < num_ranks(); ++peer) {
      if (peer != rank_ && ended_[static_cast<std::size_t>(peer)] == 0) missing.push_back(peer);
    }
  }
  stop();
  memories_.clear();
  combine_buffer_ = std::make_shared<Mapping>();
  return missing;
}

}  // namespace anyep::host
