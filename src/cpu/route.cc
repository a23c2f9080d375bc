// route(): counts per rank and expert, exchanged; every place by prefix sums; who sends which tokens here, as bits.
//
//   after   matrix[s][d] = tokens of s that go to d; place[t][d] = row of token t at d;
//           source = tokens that arrive, by source
//   syncs   counts.h (one word per value and peer), then handoff.h on the lists stream (bits of 65536 tokens a turn)
#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>

#include "core/layout.h"
#include "core/limits.h"
#include "core/routing.h"
#include "cpu/backend.h"
#include "host/op_run.h"
#include "protocol/counts.h"

namespace anyep::cpu {
namespace {

using core::kStreamLists;

constexpr std::uint64_t kTokensPerTurn = core::kMailboxBytes * 8;

class Route {
 public:
  Route(Group& group, const backend::Call& call, const backend::RouteCall& route, std::uint32_t notify_turn)
      : run_(group, call), group_(group), route_(route), state_(*route.handle), turn_(notify_turn) {
    ranks_ = static_cast<std::size_t>(group.num_ranks());
    me_ = static_cast<std::size_t>(group.rank());
  }

  void execute() {
    count();
    run_.at(kBeforeSend);
    send_counts();
    run_.at(kAfterFlag);
    receive_counts();
    run_.at(kInReceive);
    fix_places();
    exchange_lists();
    run_.finish();
  }

 private:
  std::uint64_t num_turns(std::size_t source) const {
    return std::max<std::uint64_t>(1,
                                   core::ceil_div(static_cast<std::uint64_t>(state_.tokens[source]), kTokensPerTurn));
  }
  protocol::Who who(std::size_t peer, Phase phase) const { return {static_cast<std::int32_t>(peer), phase}; }
  std::uint64_t* board(std::size_t holder, std::size_t source) const {
    const core::WindowLayout& layout = group_.layout();
    auto* const words = reinterpret_cast<std::uint64_t*>(group_.peer(static_cast<int>(holder), layout.counts));
    return words + protocol::count_slot(turn_, ranks_, source, layout.count_width);
  }

  /// What this rank's own routing says; given arrays win over what the ids would say.
  void count() {
    const Routing& routing = route_.routing;
    layout_.tokens_per_rank.assign(ranks_, 0);
    layout_.pairs_per_expert.assign(static_cast<std::size_t>(route_.num_experts), 0);
    if (routing.experts.given()) {
      layout_ = core::count_layout(core::ExpertIds(routing.experts, route_.num_experts), route_.num_experts,
                                   group_.num_ranks());
    }
    if (routing.ranks.given()) {
      const auto count = static_cast<std::size_t>(state_.num_tokens) * ranks_;
      const auto* const given = routing.ranks.as<const std::uint8_t>();
      layout_.token_in_rank.resize(count);
      std::transform(given, given + count, layout_.token_in_rank.begin(),
                     [](std::uint8_t value) -> std::uint8_t { return value != 0; });
      layout_.tokens_per_rank.assign(ranks_, 0);
      for (std::size_t at = 0; at < count; ++at) layout_.tokens_per_rank[at % ranks_] += layout_.token_in_rank[at];
    }
    if (routing.pairs_per_expert.given()) {
      const auto* const given = routing.pairs_per_expert.as<const std::int32_t>();
      layout_.pairs_per_expert.assign(given, given + route_.num_experts);
    }
  }

  void send_counts() {
    for (std::size_t step = 1; step <= ranks_; ++step) {
      const std::size_t peer = (me_ + step) % ranks_;
      std::uint64_t* const words = board(peer, me_);
      const core::ExpertBlock block =
          core::expert_block(route_.num_experts, group_.num_ranks(), static_cast<int>(peer));
      std::size_t at = 0;
      for (const std::int32_t rows : layout_.tokens_per_rank) {
        protocol::put_count(words[at++], turn_, static_cast<std::uint32_t>(rows));
      }
      protocol::put_count(words[at++], turn_, static_cast<std::uint32_t>(state_.num_tokens));
      for (int expert = 0; expert < block.count; ++expert) {
        const auto pairs = layout_.pairs_per_expert[static_cast<std::size_t>(block.first + expert)];
        protocol::put_count(words[at++], turn_, static_cast<std::uint32_t>(pairs));
      }
      if (peer != me_) protocol::ring(group_.doorbell(static_cast<int>(peer)));
    }
  }

  void receive_counts() {
    const core::ExpertBlock block = core::expert_block(route_.num_experts, group_.num_ranks(), group_.rank());
    matrix_.assign(ranks_ * ranks_, 0);
    state_.tokens.assign(ranks_, 0);
    state_.pairs_per_expert.assign(static_cast<std::size_t>(block.count), 0);
    for (std::size_t step = 0; step < ranks_; ++step) {
      const std::size_t source = (me_ + step) % ranks_;
      std::uint64_t* const words = board(me_, source);
      std::size_t at = 0;
      const auto next = [&] {
        std::uint32_t value = 0;
        run_.must(protocol::get_count(run_.waiter, who(source, kInReceive), words[at++], turn_, value),
                  who(source, kInReceive));
        return value;
      };
      for (std::size_t rank = 0; rank < ranks_; ++rank) matrix_[source * ranks_ + rank] = next();
      const std::uint32_t tokens = next();
      if (tokens > core::kMaxTokens)
        run_.corrupt(static_cast<int>(source), "a number of tokens", core::kMaxTokens, tokens);
      state_.tokens[source] = static_cast<std::int32_t>(tokens);
      for (std::size_t rank = 0; rank < ranks_; ++rank) {
        const std::int64_t rows = matrix_[source * ranks_ + rank];
        if (rows > tokens)
          run_.corrupt(static_cast<int>(source), "more rows than tokens", tokens, static_cast<std::uint64_t>(rows));
      }
      for (std::int64_t& pairs : state_.pairs_per_expert) pairs += next();
    }
  }

  void fix_places() {
    state_.rows_until.assign(ranks_, 0);
    std::int64_t rows = 0;
    for (std::size_t source = 0; source < ranks_; ++source) {
      rows += matrix_[source * ranks_ + me_];
      if (rows > core::kMaxRows) {
        core::throw_capacity(run_.call.op, "rows of one rank", static_cast<std::uint64_t>(rows), core::kMaxRows);
      }
      state_.rows_until[source] = static_cast<std::int32_t>(rows);
    }
    std::vector<std::int64_t> first(ranks_, 0);
    for (std::size_t rank = 0; rank < ranks_; ++rank) {
      for (std::size_t source = 0; source < me_; ++source) first[rank] += matrix_[source * ranks_ + rank];
    }
    state_.place = core::places(layout_.token_in_rank, group_.num_ranks(), first);
    state_.source.resize(static_cast<std::size_t>(rows));
    filled_.assign(ranks_, 0);
    for (std::size_t source = 0; source < ranks_; ++source)
      filled_[source] = state_.first_row(static_cast<int>(source));
  }

  void exchange_lists() {
    const std::uint64_t own_turns = num_turns(me_);
    std::uint64_t most = own_turns;
    for (std::size_t source = 0; source < ranks_; ++source) most = std::max(most, num_turns(source));
    for (std::uint64_t turn = 0; turn < most; ++turn) {
      for (std::size_t step = 1; step <= ranks_; ++step) {
        const std::size_t peer = (me_ + step) % ranks_;
        if (turn < own_turns) send_list(peer, turn);
      }
      if (turn == 0) run_.at(kMidSend);
      for (std::size_t step = 1; step < ranks_; ++step) {
        const std::size_t source = (me_ + step) % ranks_;
        if (turn < num_turns(source)) receive_list(source, turn);
      }
    }
    for (std::size_t source = 0; source < ranks_; ++source) {
      const auto want = static_cast<std::uint64_t>(state_.last_row(static_cast<int>(source)));
      const auto got = static_cast<std::uint64_t>(filled_[source]);
      if (want != got) run_.corrupt(static_cast<int>(source), "a token list of another length", want, got);
    }
  }

  std::uint64_t tokens_of_turn(std::size_t source, std::uint64_t turn) const {
    const auto tokens = static_cast<std::uint64_t>(state_.tokens[source]);
    return std::min(kTokensPerTurn, tokens - std::min(tokens, turn * kTokensPerTurn));
  }

  void send_list(std::size_t peer, std::uint64_t turn) {
    const std::uint64_t begin = turn * kTokensPerTurn;
    const std::uint64_t tokens = tokens_of_turn(me_, turn);
    const std::uint8_t* const in_rank = layout_.token_in_rank.data() + begin * ranks_ + peer;
    if (peer == me_) {
      for (std::uint64_t token = 0; token < tokens; ++token) {
        if (in_rank[token * ranks_] != 0) add_source(me_, begin + token);
      }
      return;
    }
    protocol::Producer producer(group_.producer_end(kStreamLists, static_cast<int>(peer)), group_.generation(), kCode);
    run_.must(producer.wait_for_credit(run_.waiter, who(peer, kBeforeSend)), who(peer, kBeforeSend));
    auto* const box = reinterpret_cast<std::uint64_t*>(
        group_.peer(static_cast<int>(peer), group_.layout().mailbox(group_.rank(), producer.turn())));
    for (std::uint64_t first = 0; first < tokens; first += 64) {
      std::uint64_t bits = 0;
      for (std::uint64_t token = first; token < std::min(first + 64, tokens); ++token) {
        bits |= std::uint64_t{in_rank[token * ranks_]} << (token - first);
      }
      box[first / 64] = bits;
    }
    producer.publish();
  }

  void receive_list(std::size_t source, std::uint64_t turn) {
    protocol::Consumer consumer(group_.consumer_end(kStreamLists, static_cast<int>(source)), group_.generation(),
                                kCode);
    run_.must(consumer.wait_for_arrival(run_.waiter, who(source, kInReceive)), who(source, kInReceive));
    const auto* const box = reinterpret_cast<const std::uint64_t*>(
        group_.own(group_.layout().mailbox(static_cast<int>(source), consumer.turn())));
    const std::uint64_t tokens = tokens_of_turn(source, turn);
    for (std::uint64_t first = 0; first < tokens; first += 64) {
      std::uint64_t bits = box[first / 64];
      if (tokens - first < 64) bits &= (std::uint64_t{1} << (tokens - first)) - 1;
      for (; bits != 0; bits &= bits - 1) {
        add_source(source, turn * kTokensPerTurn + first + static_cast<std::uint64_t>(std::countr_zero(bits)));
      }
    }
    consumer.take();
    consumer.grant(core::kRegions);
  }

  /// Bits beyond the announced count are counted by `filled_`, never written.
  void add_source(std::size_t source, std::uint64_t token) {
    const std::int64_t row = filled_[source]++;
    if (row < state_.last_row(static_cast<int>(source))) {
      state_.source[static_cast<std::size_t>(row)] = static_cast<std::int32_t>(token);
    }
  }

  static constexpr std::uint16_t kCode = protocol::make_code(kStreamLists, 0);

  OpRun run_;
  Group& group_;
  const backend::RouteCall& route_;
  Handle::State& state_;
  const std::uint32_t turn_;
  std::size_t ranks_ = 0, me_ = 0;
  Layout layout_;
  std::vector<std::int64_t> matrix_;  ///< [source][destination] rows
  std::vector<std::int64_t> filled_;  ///< [source] next row of `source`
};

}  // namespace

void CpuBackend::route(const backend::Call& call, const backend::RouteCall& route) {
  notify_turn_ = protocol::next_epoch(notify_turn_);
  if (route.routing.experts.given()) {
    ids_out_of_range_ += core::ExpertIds(route.routing.experts, route.num_experts).count_out_of_range();
  }
  Route(*group_, call, route, notify_turn_).execute();
}

}  // namespace anyep::cpu
