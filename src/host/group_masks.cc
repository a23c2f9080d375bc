// Masks of low latency: who is left out of a turn, and how two ranks agree to count each other in again.
//
//   rule    readmission starts with a turn that neither has begun, and each has left the other out since a moment at
//           which it was inside no half of an op (models/low_latency_regions.py: every shortcut reads other turns' rows).
//           It takes effect with the first dispatch from that turn on: a combine needs its dispatch.
//   words   ask -> offer -> confirm -> done (models/readmission.py). Nobody stops for them: an offer that comes too late
//           is answered by a later turn, a confirmation that comes too late by another offer. Only who has confirmed a
//           turn and reaches it before the last word has come waits for that word, which the peer's watcher sends at once.
//   order   a word is sent before the mutex is released under which it was decided, so that the peer hears the words in
//           the order of the decisions: a question that the peer's overtook must not look like a new one
//   both    when both ask, the lower rank's question counts
//   off     who masks closes the peer's question by a word, its own where it is offered something for it: no question
//           stays open, for beside an open one no other is asked
#include <algorithm>
#include <chrono>

#include "core/fault_point.h"
#include "host/group.h"

namespace anyep::host {

void Group::set_mask(int peer, bool mask) noexcept {
  protocol::Shared(masked()[peer]).store(mask ? 1u : 0u, protocol::kRelaxed);
}

void Group::mask(int peer) noexcept {
  const std::lock_guard lock(mutex_);
  Readmission& readmission = readmissions_[static_cast<std::size_t>(peer)];
  if (readmission.question != 0 && !asks(readmission)) {
    tell_of_readmission(peer, kMessageUnmaskOff, 0, readmission.question);
  }
  readmission = {};
  set_mask(peer, true);
}

bool Group::is_masked(int peer, std::uint32_t turn) const {
  const auto at = static_cast<std::size_t>(peer);
  if (protocol::Shared(masked()[peer]).load(protocol::kRelaxed) != 0) return true;
  const std::uint32_t since = readmissions_[at].since;
  return since != 0 && !protocol::not_before(turn, since);
}

void Group::begin_half(Half half, std::uint64_t limit_ns, std::uint32_t* turn) {
  std::unique_lock lock(mutex_);
  ++num_halves_;
  if (half == Half::kReceive) return;
  *turn = low_latency_turn_ = protocol::next_epoch(low_latency_turn_);
  for (int peer = 0; peer < num_ranks(); ++peer) {
    const auto at = static_cast<std::size_t>(peer);
    Readmission& readmission = readmissions_[at];
    // Two turns are in flight at most: what was sent before then has been received.
    if (readmission.since != 0 && *turn - readmission.since > core::kLowLatencyRegions) readmission.since = 0;
    const auto is_due = [&] { return readmission.turn != 0 && protocol::not_before(*turn, readmission.turn); };
    if (half != Half::kDispatchSend || !is_due()) continue;
    const auto is_certain = [&] { return readmission.settled || !is_due() || ended_[at] != 0 || first_error_; };
    changed_.wait_for(lock, std::chrono::nanoseconds(limit_ns), is_certain);
    if (!is_due()) continue;
    const bool agreed = readmission.settled && ended_[at] == 0;
    readmission = {};
    if (!agreed) continue;
    readmission.since = *turn;
    set_mask(peer, false);
  }
}

void Group::end_half() noexcept {
  const std::lock_guard lock(mutex_);
  --num_halves_;
  if (!budget_.masks) return;
  for (int peer = 0; peer < num_ranks(); ++peer) answer(peer, readmissions_[static_cast<std::size_t>(peer)]);
}

/// `at_least`, or some turns later than this rank's next where that one has been begun.
std::uint32_t Group::turn_not_begun(std::uint32_t at_least, Readmission& readmission) const {
  const std::uint32_t next = protocol::next_epoch(low_latency_turn_);
  if (protocol::not_before(at_least, next)) return at_least;
  readmission.margin = std::min(readmission.margin * 2, 1024u);
  return protocol::Producer::advance(next, readmission.margin);
}

void Group::tell_of_readmission(int peer, std::uint32_t kind, std::uint32_t turn, std::uint64_t question) noexcept {
  control_->tell(peer, message_of(kind, generation_, turn, question, ""));
}

/// Unless there is no question, or a half goes on: its end answers.
void Group::answer(int peer, Readmission& readmission) noexcept {
  if (readmission.their_turn == 0 || num_halves_ != 0) return;
  set_mask(peer, true);
  readmission.turn = 0;
  const std::uint32_t turn =
      turn_not_begun(protocol::Producer::advance(readmission.their_turn, readmission.margin), readmission);
  readmission.their_turn = 0;
  tell_of_readmission(peer, kMessageUnmaskOffer, turn, readmission.question);
}

bool Group::asks(const Readmission& readmission) const noexcept {
  return readmission.question != 0 && readmission.question % memories_.size() == static_cast<std::uint64_t>(rank_);
}

void Group::ask(int peer, Readmission& readmission) noexcept {
  readmission.wanted = false;
  readmission.question = ++num_questions_ * memories_.size() + static_cast<std::uint64_t>(rank_);
  core::fault_point("unmask.ask", rank_, readmission.question);
  tell_of_readmission(peer, kMessageUnmask, protocol::next_epoch(low_latency_turn_), readmission.question);
}

void Group::ask_unmask(int peer) noexcept {
  const std::lock_guard lock(mutex_);
  const auto at = static_cast<std::size_t>(peer);
  Readmission& readmission = readmissions_[at];
  const bool is_masked_now = protocol::Shared(masked()[peer]).load(protocol::kRelaxed) != 0;
  if (!is_masked_now || ended_[at] != 0) return;
  if (asks(readmission) || readmission.turn != 0) return;  // or it is agreed
  if (readmission.question != 0) {
    readmission.wanted = true;
  } else {
    ask(peer, readmission);
  }
}

void Group::on_readmission(int peer, const control::Message& message) noexcept {
  const auto turn = static_cast<std::uint32_t>(message.a);
  const std::uint64_t question = message.b;
  const std::lock_guard lock(mutex_);
  Readmission& readmission = readmissions_[static_cast<std::size_t>(peer)];
  const bool is_open = question != 0 && readmission.question == question;
  switch (message.kind) {
    case kMessageUnmask:
      if (asks(readmission) && rank_ < peer) return;
      readmission = {.question = question,
                     .their_turn = turn,
                     .wanted = readmission.wanted || asks(readmission),
                     .since = readmission.since};
      return answer(peer, readmission);
    case kMessageUnmaskOffer:
      core::fault_point("unmask.offered", rank_, question);
      if (!is_open) return tell_of_readmission(peer, kMessageUnmaskOff, turn, question);  // taken back
      readmission.turn = turn_not_begun(turn, readmission);
      return tell_of_readmission(peer, kMessageUnmaskConfirm, readmission.turn, question);
    case kMessageUnmaskConfirm: {
      if (!is_open) return;  // closed
      const std::uint32_t possible = turn_not_begun(turn, readmission);
      readmission.settled = possible == turn;
      readmission.turn = readmission.settled ? turn : 0;
      if (readmission.settled) readmission.question = 0, readmission.wanted = false;
      return tell_of_readmission(peer, readmission.settled ? kMessageUnmaskDone : kMessageUnmaskOffer, possible,
                                 question);
    }
    case kMessageUnmaskDone:
      if (!is_open || readmission.turn != turn) return;
      readmission.question = 0;
      readmission.settled = true;
      return;
    default:
      if (!is_open) return;
      readmission.question = readmission.turn = readmission.their_turn = 0;
      if (readmission.wanted) ask(peer, readmission);
  }
}

}  // namespace anyep::host
