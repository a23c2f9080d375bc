// Slots that lie untouched while the epochs go once around: what was written there 2^32 turns ago carries the epoch that is waited
// for now, and only the turns that clear it (low_latency_frame.cuh) keep it from being taken.
//
// Turns in between are jumped over, always by less than half the circle, so that marks compare as they would. The control
// makes the same journey around those turns: the old rows must then be taken for new ones, else the test shows nothing.
#pragma once

#include "low_latency_case.h"

namespace anyep::test {

class Untouched {
 public:
  Untouched(World& world, Test& test) : world_(world), test_(test) {}

  /// A part of run(): through the clearing turns, in records. Blocks that retreat there have not cleared all that is theirs.
  bool records_go_around() { return go_around(200, Wire::kBF16, kThrough) == Outcome::kRight; }

  bool run() {
    struct Form {
      const char* name;
      int tokens;
    };
    bool right = true;
    for (const Form& form : {Form{"words", 12}, Form{"packets", 60}, Form{"records", 200}}) {
      for (const Wire wire : {Wire::kBF16, Wire::kFP8}) {
        if (go_around(form.tokens, wire, kThrough) != Outcome::kRight) return false;
      }
      if (world_.num_ranks() == 1) continue;  // nobody is late against itself
      int taken = 0;
      std::printf("old %s: failures must follow\n", form.name);
      for (int round = 0; round < kControls; ++round) {
        const Outcome outcome = go_around(form.tokens, Wire::kBF16, kPast);
        if (outcome == Outcome::kBroken) return false;
        taken += outcome == Outcome::kOldTaken ? 1 : 0;
      }
      std::printf("old %s were taken in %d of %d journeys that leave the clearing turns out\n", form.name, taken,
                  kControls);
      right = right && taken > 0;
    }
    world_.reset();
    return right;
  }

 private:
  static constexpr int kControls = 4, kPairsAtStop = 8;
  static constexpr std::uint32_t kBefore = 0x0FFF;  ///< the turn before the slots are written
  enum class Outcome { kRight, kOldTaken, kBroken };
  /// Stops on the way; from there kPairsAtStop pairs pass.
  using Journey = std::uint32_t[2];
  static constexpr Journey kThrough = {0x7FFF'FFFD, 0xFFFF'FFFB}, kPast = {0x8000'0010, 0x0000'0010};

  Pair pair_of(int tokens, Wire wire) const {
    Pair pair;
    pair.shape.num_experts = 8;
    pair.shape.top_k = 4;
    pair.shape.hidden = 1024;
    pair.shape.max_tokens = std::max(tokens, 1);
    pair.tokens.assign(static_cast<std::size_t>(world_.num_ranks()), tokens);
    pair.dispatch.wire = wire;
    return pair;
  }

  bool play(const Run& run) {
    for (int r = 0; r < world_.num_ranks(); ++r) {
      test_.dispatch(run, r, ll::kSend | ll::kReceive);
      test_.combine(run, r, ll::kSend | ll::kReceive);
    }
    return test_.settled("an untouched slot") && test_.check_dispatch(run) && test_.check_combine(run);
  }

  /// Other rows for the same choices: an old one in their place is wrong.
  void renew(Run& run) {
    const Shape& shape = run.pair.shape;
    std::vector<TensorView> x;
    for (std::size_t at = 0; at < run.x.size(); ++at) {
      for (std::uint16_t& value : run.x[at]) value ^= 0x21;
      for (std::uint16_t& value : run.y[at]) value ^= 0x21;
      x.push_back(TensorView::dense(run.x[at].data(), DType::kBF16, {run.pair.tokens[at], shape.hidden}));
    }
    run.want = reference::low_latency_dispatch(shape, x, run.routing, {run.pair.dispatch.wire, false});
    std::vector<ExpertSlabs> slabs;
    for (std::size_t at = 0; at < run.y.size(); ++at) {
      const reference::Slabs& want = run.want[at];
      const std::int64_t experts = want.local_experts, rows = want.rows_per_expert;
      ExpertSlabs in;
      in.x = TensorView::dense(run.y[at].data(), DType::kBF16, {experts, rows, shape.hidden});
      in.source = TensorView::dense(want.source.data(), DType::kI32, {experts, rows});
      in.range = TensorView::dense(want.range.data(), DType::kI64, {experts, world_.num_ranks()});
      slabs.push_back(in);
    }
    run.want_out = reference::low_latency_combine(shape, slabs, run.routing, {});
    test_.upload(run, 0);
  }

  /// Writes the slots in all four regions, leaves them alone for 2^32 turns, and uses them again in turns of the same epochs.
  Outcome go_around(int tokens, Wire wire, const Journey& journey) {
    world_.reset();
    Run run;
    test_.prepare(run, pair_of(tokens, wire), 0);
    world_.set_turn(kBefore);
    for (int i = 0; i < 2; ++i) {
      test_.upload(run, 0);
      if (!play(run)) return Outcome::kBroken;
    }
    for (const std::uint32_t stop : journey) {
      world_.set_turn(stop);
      for (int i = 0; i < kPairsAtStop; ++i) {
        Run small;
        test_.prepare(small, pair_of(i % 2, wire), 1);
        if (!play(small)) return Outcome::kBroken;
      }
    }
    world_.set_turn(kBefore);
    for (int i = 0; i < 2; ++i) {
      renew(run);
      if (play(run)) continue;
      return world_.failed() < 0 ? Outcome::kOldTaken : Outcome::kBroken;
    }
    return Outcome::kRight;
  }

  World& world_;
  Test& test_;
};

}  // namespace anyep::test
