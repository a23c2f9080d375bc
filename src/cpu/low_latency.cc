#include "cpu/low_latency.h"

#include <fmt/format.h>

#include "core/log.h"
#include "protocol/doorbell.h"

namespace anyep::cpu {

LowLatencyRun::LowLatencyRun(Group& group, backend::LowLatencyCall& call, Half half)
    : run(group, call.call, half == Half::kSend ? OpRun::Start::kAnnounce : OpRun::Start::kResume),
      group_(group),
      call_(call) {
  const bool dispatches = call.call.kind == static_cast<unsigned>(Op::kLowLatencyDispatch) + 1;
  group.begin_half(half == Half::kReceive ? Group::Half::kReceive
                   : dispatches           ? Group::Half::kDispatchSend
                                          : Group::Half::kCombineSend,
                   call.call.limit_ns, &call.turn);
  if (group.budget().masks) run.waiter.masked = group.masked();
  if (call.options.waited.given()) run.waiter.waited_ns = call.options.waited.as<std::uint64_t>();
}

LowLatencyRun::~LowLatencyRun() {
  group_.end_half();
}

bool LowLatencyRun::masked(int peer) const {
  return run.waiter.masked != nullptr && group_.is_masked(peer, call_.turn);
}

std::byte* LowLatencyRun::region(int holder, int source) const {
  return group_.peer(holder, group_.layout().low_latency_region(source, call_.turn));
}

std::uint64_t LowLatencyRun::mark() const {
  return protocol::make_mark(group_.generation(), call_.turn, run.code);
}

void LowLatencyRun::publish(std::uint64_t array, int peer) {
  protocol::Shared(group_.word(peer, array, me())).store(mark(), protocol::kRelease);  // pattern A, litmus mp-sys
  if (peer != me()) protocol::ring(group_.doorbell(peer));
}

bool LowLatencyRun::landed(std::uint64_t array, int peer, Phase phase) {
  if (masked(peer)) return false;  // whatever it may have sent
  const protocol::Who who{peer, phase};
  const protocol::Ended ended = protocol::wait(run.waiter, who, group_.word(me(), array, peer), mark());
  if (ended == protocol::Ended::kReached) return true;
  if (ended == protocol::Ended::kMasked) return false;
  if (!group_.budget().masks || !run.is_silent(ended, peer)) run.must(ended, who);
  group_.set_mask(peer, true);
  core::log_warning(fmt::format("{}: rank {} did not answer in time and is masked from now on", call_.call.op, peer));
  run.forget_fault();
  return false;
}

core::LowLatencyHead LowLatencyRun::head(int source, std::uint64_t offset, std::uint64_t most_entries) {
  // A copy: what was checked is what is used, whatever a faulty peer writes meanwhile.
  const auto head = *reinterpret_cast<const core::LowLatencyHead*>(region(me(), source) + offset);
  run.check_record(source, head.call, head.code);
  const auto most_tokens = static_cast<std::uint64_t>(call_.shape.max_tokens);
  if (head.num_tokens > most_tokens) run.corrupt(source, "a number of tokens", most_tokens, head.num_tokens);
  if (head.num_entries > most_entries) run.corrupt(source, "a number of entries", most_entries, head.num_entries);
  return head;
}

void LowLatencyRun::end_late() {
  // The looks at peers' announcements, on cold lines, would cost an op of some microseconds too much.
  const bool late = protocol::now_ns() - run.waiter.start_ns > run.waiter.limit_ns / 4;
  if (late && run.waiter.masked == nullptr) run.finish();
}

core::LowLatencyHead LowLatencyRun::make_head(std::int64_t num_tokens, std::size_t num_entries) const {
  return {run.call.number, run.code, static_cast<std::uint32_t>(num_tokens), static_cast<std::uint32_t>(num_entries)};
}

ChoiceTable::ChoiceTable(const core::ExpertIds& ids, int num_experts, int num_ranks)
    : top_k(ids.top_k()),
      choices(static_cast<std::size_t>(ids.num_tokens() * ids.top_k())),
      per_expert(static_cast<std::size_t>(num_experts), 0) {
  for (std::int64_t token = 0; token < ids.num_tokens(); ++token) {
    Choice* const row = choices.data() + token * top_k;
    for (int at = 0; at < top_k; ++at) {
      const int expert = ids.at(token, at);
      if (expert < 0) continue;
      Choice& choice = row[at];
      choice.rank = core::rank_of_expert(num_experts, num_ranks, expert);
      choice.expert = expert - core::expert_block(num_experts, num_ranks, choice.rank).first;
      for (int before = 0; before < at && choice.first; ++before) {
        if (row[before].rank != choice.rank || row[before].expert != choice.expert) continue;
        choice.first = false;
        choice.position = row[before].position;
      }
      if (choice.first) choice.position = per_expert[static_cast<std::size_t>(expert)]++;
    }
    for (int at = 0; at < top_k; ++at) {
      for (int other = 0; other < top_k; ++other) {
        row[at].index += row[other].first && row[other].rank == row[at].rank && row[other].expert < row[at].expert;
      }
    }
  }
}

}  // namespace anyep::cpu
