// What both low-latency ops share: turns, marks, masks, and where a token's choices lie.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "backend/backend.h"
#include "core/layout.h"
#include "core/routing.h"
#include "host/group.h"
#include "host/op_run.h"

namespace anyep::cpu {

using namespace host;  // CPU ranks live wholly in the memory of their host

/// One half of a low-latency op.
class LowLatencyRun {
 public:
  enum class Half { kSend, kReceive };
  /// The send half takes the next turn.
  LowLatencyRun(Group& group, backend::LowLatencyCall& call, Half half);
  ~LowLatencyRun();
  LowLatencyRun(const LowLatencyRun&) = delete;
  LowLatencyRun& operator=(const LowLatencyRun&) = delete;

  int ranks() const { return group_.num_ranks(); }
  int me() const { return group_.rank(); }
  bool masked(int peer) const;
  /// The region that `source` fills at `holder` in this turn.
  std::byte* region(int holder, int source) const;
  /// Tells `peer` that this rank's part lies in its region: `array` is one of the layout's low-latency words.
  void publish(std::uint64_t array, int peer);
  /// Waits for a peer's part; false when the peer is masked, or is masked now because it passed the limit.
  bool landed(std::uint64_t array, int peer, Phase phase);
  /// The head under the mark; must name this call. `most_entries` bounds what follows.
  core::LowLatencyHead head(int source, std::uint64_t offset, std::uint64_t most_entries);
  /// After the last wait of a rank that was held up for long: peers may have given up and left.
  void end_late();
  core::LowLatencyHead make_head(std::int64_t num_tokens, std::size_t num_entries) const;
  core::ExpertBlock block(int rank) const { return core::expert_block(call_.shape.num_experts, ranks(), rank); }

  OpRun run;

 protected:
  Group& group_;
  backend::LowLatencyCall& call_;

 private:
  std::uint64_t mark() const;
};

/// Where each choice of this rank's tokens goes. A (token, expert) pair counts once, however often it is chosen.
struct ChoiceTable {
  struct Choice {
    int rank = -1;      ///< -1 = no expert
    int expert = 0;     ///< local there
    int position = 0;   ///< among this rank's tokens of that expert
    int index = 0;      ///< among the token's distinct experts at that rank, ascending
    bool first = true;  ///< not a repetition of an earlier choice of the token
  };
  int top_k = 0;
  std::vector<Choice> choices;           ///< [tokens * top_k]
  std::vector<std::int32_t> per_expert;  ///< [num_experts] tokens of this rank

  ChoiceTable(const core::ExpertIds& ids, int num_experts, int num_ranks);
  const Choice* of(std::int64_t token) const { return choices.data() + token * top_k; }
};

}  // namespace anyep::cpu
