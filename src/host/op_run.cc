#include "host/op_run.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "core/fault_point.h"
#include "protocol/word.h"

namespace anyep::host {
namespace {

using protocol::Ended;
using protocol::Shared;

std::uint64_t digest_of(const backend::Call& call) {
  std::uint64_t digest = protocol::kDigestSeed;
  for (const std::uint64_t word : call.description) digest = protocol::digest(digest, word);
  return digest;
}

/// The words of a description, in order (core::kDescriptionWords).
constexpr std::array<const char*, core::kDescriptionWords> kDescriptionNames = {
    "operation", "num_experts", "top_k", "hidden", "element type", "max_tokens", "scales or extra bytes", "options"};

/// Kind of an announcement that replaces a call's: this rank has thrown out of it. No op has it (Op + 1 <= 6).
constexpr unsigned kKindLeft = 15;
/// How long a rank that finds a peer gone looks for the reason, which comes over the control link: a message of some
/// microseconds, on cores that may be busy.
constexpr std::uint64_t kReasonNs = 200'000'000;

const char* op_name_of_kind(std::uint64_t kind) {
  return kind == 0 || kind > static_cast<std::uint64_t>(Op::kBarrier) + 1 ? "no operation"
                                                                          : name_of(static_cast<Op>(kind - 1));
}

}  // namespace

const char* phase_name(std::uint32_t phase) {
  constexpr const char* kNames[] = {"before_send", "mid_send", "after_flag", "in_recv"};
  return phase < std::size(kNames) ? kNames[phase] : "between";
}

OpRun::OpRun(Group& the_group, const backend::Call& the_call, Start start, std::uint64_t start_ns)
    : group(the_group),
      call(the_call),
      code(protocol::make_code(the_call.kind, digest_of(the_call))),
      announced_(start != Start::kResume) {
  const int me = group.rank();
  waiter.abort = group.abort_word();
  waiter.doorbell = &group.doorbell(me);
  waiter.record = &record_;
  waiter.start_ns = start_ns != 0 ? start_ns : protocol::now_ns();
  waiter.limit_ns = call.limit_ns;
  waiter.announced = &group.word(me, group.layout().announced, 0);
  waiter.announced_stride = core::kWordBytes / sizeof(std::uint64_t);
  waiter.announcement = protocol::make_mark(group.generation(), call.number, code);
  waiter.gone = group.gone();
  if (start == Start::kResume) return;
  if (start == Start::kRightBehind) {
    group.begin_call_right_behind(call.number);
  } else {
    group.begin_call(call.number);
  }
  auto* const described = reinterpret_cast<std::uint64_t*>(group.own(group.layout().described));
  for (std::size_t word = 0; word < call.description.size(); ++word) {
    Shared(described[word]).store(call.description[word], protocol::kRelaxed);
  }
  if (group.failed()) leave(kBeforeSend);  // described all the same: peers may ask who was in another call
  announce(waiter.announcement);           // pattern A: after the description, which a peer may compare
}

void OpRun::announce(std::uint64_t mark) const {
  for (int peer = 0; peer < group.num_ranks(); ++peer) {
    if (peer == group.rank()) continue;
    Shared(group.word(peer, group.layout().announced, group.rank())).store(mark, protocol::kRelease);
  }
}

void OpRun::leave_with(const Error& error) {
  group.fail(error);
  // The second half of an op may end when the next one has been announced already: words only move forward.
  if (announced_) announce(protocol::make_mark(group.generation(), call.number, protocol::make_code(kKindLeft, 0)));
  throw Error(error);
}

void OpRun::leave(std::uint32_t phase) {
  leave_with(aborted(phase));
}

bool OpRun::has_left(int peer) const {
  // Pattern F in reverse: a read-modify-write, so that what was read before cannot have been read after it.
  const std::uint64_t seen =
      Shared(group.word(group.rank(), group.layout().announced, peer)).fetch_add(0, protocol::kSequential);
  return protocol::contradicts(seen, waiter.announcement) && protocol::kind_of(protocol::code_of(seen)) == kKindLeft;
}

void OpRun::fail_with(const protocol::FaultRecord& record) {
  record_ = record;
  fail(static_cast<Ended>(record.ended), {record.peer, record.phase});
}

void OpRun::forget_fault() {
  record_ = {};
  waiter.start_ns = protocol::now_ns();
}

void OpRun::at(Phase phase) {
  if constexpr (core::kFaultPoints) {
    core::fault_point(fmt::format("{}.{}", call.op, phase_name(phase)).c_str(), group.rank(), call.number);
  }
  // Once a rank sends it finds out in its waits: a peer that leaves may have been content with this op, and others may be
  // content with what this rank still sends.
  if (phase == kBeforeSend && group.failed()) leave(phase);
}

Error OpRun::named(ErrorCode error_code, std::uint32_t phase, const std::string& text) const {
  Error error(error_code, fmt::format("{} (call {}, phase {}) on rank {}: {}", call.op,
                                      call.number - protocol::kFirstEpoch, phase_name(phase), group.rank(), text));
  error.rank = group.rank();
  error.op = call.op;
  error.phase = phase_name(phase);
  error.generation = group.generation();
  error.sequence = call.number;
  error.limit_ns = call.limit_ns;
  error.elapsed_ns = record_.claimed != 0 ? record_.elapsed_ns : protocol::now_ns() - waiter.start_ns;
  return error;
}

Error OpRun::aborted(std::uint32_t phase) const {
  const std::optional<Error> first = group.first_error();
  if (!first) return named(ErrorCode::kInternal, phase, "the abort word is set without an error");
  Error error = named(first->code, phase, first->what());
  error.peers = first->peers;
  error.expected = first->expected;
  error.seen = first->seen;
  // Who found the disagreement blames whom it met first; what this rank sees itself is nearer.
  const std::vector<int> others = first->code == ErrorCode::kMismatch ? in_other_calls() : std::vector<int>();
  if (!others.empty()) error.peers = others;
  return error;
}

std::vector<int> OpRun::in_other_calls() const {
  std::vector<int> others;
  for (int peer = 0; peer < group.num_ranks(); ++peer) {
    if (peer == group.rank()) continue;
    const std::uint64_t seen =
        Shared(group.word(group.rank(), group.layout().announced, peer)).load(protocol::kAcquire);
    if (protocol::generation_of(seen) != group.generation() || protocol::epoch_of(seen) != call.number) continue;
    auto* theirs = reinterpret_cast<std::uint64_t*>(group.peer(peer, group.layout().described));
    for (const std::uint64_t mine : call.description) {
      if (Shared(*theirs++).load(protocol::kRelaxed) == mine) continue;
      others.push_back(peer);
      break;
    }
  }
  return others;
}

std::vector<int> OpRun::not_yet_here(int at_least) const {
  std::vector<int> missing;
  for (int peer = 0; peer < group.num_ranks(); ++peer) {
    if (peer == group.rank()) continue;
    const std::uint64_t seen =
        Shared(group.word(group.rank(), group.layout().announced, peer)).load(protocol::kRelaxed);
    if (peer == at_least || !protocol::reached(seen, waiter.announcement)) missing.push_back(peer);
  }
  return missing;
}

void OpRun::fail(Ended ended, const protocol::Who& who) {
  switch (ended) {
    case Ended::kMismatch:
      mismatch(who.peer, who.phase);
    case Ended::kPeerGone:
      gone(who.peer, who.phase);
    case Ended::kTimeout:
      timed_out(who);
    case Ended::kTooMany:
      too_many(who);
    default:
      leave(who.phase);
  }
}

/// Which of the two it is, the group knows better, where it has failed because of it.
void OpRun::gone(int peer, std::uint32_t phase) {
  if (group.failed()) leave(phase);
  const bool dead = Shared(group.gone()[peer]).load(protocol::kAcquire) == kDead;
  Error error = named(dead ? ErrorCode::kPeerDead : ErrorCode::kAborted, phase,
                      fmt::format("rank {} {} without doing its part", peer, dead ? "died" : "closed its engine"));
  error.peers = {peer};
  leave_with(error);
}

void OpRun::left(int peer, std::uint32_t phase) {
  if (group.wait_until_failed(kReasonNs)) leave(phase);
  Error error = named(ErrorCode::kAborted, phase, fmt::format("rank {} has left this call", peer));
  error.peers = {peer};
  leave_with(error);
}

void OpRun::timed_out(const protocol::Who& who) {
  const std::vector<int> missing = not_yet_here(who.peer);
  const std::uint64_t seen =
      Shared(group.word(group.rank(), group.layout().announced, who.peer)).load(protocol::kRelaxed);
  Error error = named(
      ErrorCode::kTimeout, who.phase,
      fmt::format("no word from rank {} within {:.3f} s; expected turn {}, seen turn {}; its last call is "
                  "{}; ranks that have not done their part: {}",
                  who.peer, static_cast<double>(call.limit_ns) * 1e-9, protocol::epoch_of(record_.expected),
                  protocol::epoch_of(record_.seen),
                  seen == 0 ? std::string("none") : fmt::to_string(protocol::epoch_of(seen) - protocol::kFirstEpoch),
                  fmt::join(missing, ", ")));
  error.peers = missing;
  error.expected = record_.expected;
  error.seen = record_.seen;
  error.elapsed_ns = record_.elapsed_ns;
  leave_with(error);
}

void OpRun::too_many(const protocol::Who& who) {
  Error error = named(ErrorCode::kCapacity, who.phase,
                      fmt::format("rank {} has to do with {} where {} is the most that fits", who.peer, record_.seen,
                                  record_.expected));
  error.peers = {who.peer};
  error.need = record_.seen;
  error.have = record_.expected;
  leave_with(error);
}

void OpRun::mismatch(int peer, std::uint32_t phase) {
  must_not_have_left(peer, static_cast<Phase>(phase));
  std::string text = fmt::format("rank {} makes another call at this place:", peer);
  const auto* const theirs = reinterpret_cast<std::uint64_t*>(group.peer(peer, group.layout().described));
  for (std::size_t word = 0; word < call.description.size(); ++word) {
    const std::uint64_t their = Shared(const_cast<std::uint64_t&>(theirs[word])).load(protocol::kRelaxed);
    const std::uint64_t mine = call.description[word];
    if (their == mine) continue;
    if (word == 0) {
      text += fmt::format(" rank {} is in {}, rank {} in {};", peer, op_name_of_kind(their), group.rank(), call.op);
      break;
    }
    text += fmt::format(" {} is {} there and {} here;", kDescriptionNames[word], static_cast<std::int64_t>(their),
                        static_cast<std::int64_t>(mine));
  }
  Error error = named(ErrorCode::kMismatch, phase, text);
  error.peers = in_other_calls();
  if (error.peers.empty()) error.peers = {peer};
  error.expected = record_.expected;
  error.seen = record_.seen;
  leave_with(error);
}

void OpRun::disagree(int peer, const char* what) {
  Error error = named(ErrorCode::kMismatch, kMidSend, fmt::format("with rank {}: {}", peer, what));
  error.peers = {peer};
  leave_with(error);
}

void OpRun::check_record(int peer, std::uint32_t record_call, std::uint32_t record_code) {
  if (record_call == call.number && record_code == code) return;
  if (record_call == call.number || protocol::kind_of(static_cast<std::uint16_t>(record_code)) != call.kind) {
    mismatch(peer, kInReceive);
  }
  corrupt(peer, "a record of another call", call.number, record_call);
}

void OpRun::finish() {
  for (int peer = 0; peer < group.num_ranks(); ++peer) {
    if (peer == group.rank()) continue;
    const std::uint64_t seen =
        Shared(group.word(group.rank(), group.layout().announced, peer)).load(protocol::kAcquire);
    if (protocol::contradicts(seen, waiter.announcement)) mismatch(peer, kInReceive);  // or has left
  }
}

void OpRun::corrupt(int peer, const char* what, std::uint64_t expected, std::uint64_t seen) {
  Error error = named(ErrorCode::kCorrupt, kInReceive,
                      fmt::format("rank {} wrote {}: expected {}, seen {}", peer, what, expected, seen));
  error.peers = {peer};
  error.expected = expected;
  error.seen = seen;
  leave_with(error);
}

}  // namespace anyep::host
