// One rank of an engine world: plays a scenario's steps in order.
#pragma once

#include <anyep/bootstrap.h>
#include <anyep/engine.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "support/inputs.h"
#include "support/mirror.h"
#include "support/outputs.h"
#include "support/scenario.h"

namespace anyep::test {

/// Words in memory that all ranks share: has a rank's call of a step returned?
class Returned {
 public:
  static std::size_t num_words(const Scenario& scenario) {
    return scenario.steps.size() * static_cast<std::size_t>(scenario.num_ranks);
  }
  Returned(std::atomic<std::uint32_t>* words, int num_ranks) : words_(words), num_ranks_(num_ranks) {}
  void set(int step, int rank) const { word(step, rank).store(1, std::memory_order_release); }
  bool has(int step, int rank) const { return word(step, rank).load(std::memory_order_acquire) != 0; }

 private:
  std::atomic<std::uint32_t>& word(int step, int rank) const { return words_[step * num_ranks_ + rank]; }
  std::atomic<std::uint32_t>* words_;
  int num_ranks_;
};

class RankRun {
 public:
  /// `mirror`: where the engines find the tensors; none = in host memory.
  RankRun(const Scenario& scenario, int rank, const Returned& returned, std::unique_ptr<Mirror> mirror = {});
  /// Never throws: what went wrong is the field "failed" of the step.
  RankOutputs play(const LocalGroup& group);

 private:
  /// What a step must keep alive, and what later steps use.
  struct Kept {
    Tensors in, out;
    std::optional<Handle> handle;
    std::optional<Routing> routing;  ///< of a route that its dispatch makes
    bool has_source = false;         ///< of the handle, among the outputs
    OwnedRows window_in, window_out;
    TensorView received_x;
    ExpertSlabs slabs;
    std::optional<Pending> pending;
    Event event;
    std::function<void()> record;
  };
  using Call = std::function<Event(const Options&)>;

  Kept& kept(int step) { return kept_[static_cast<std::size_t>(step)]; }
  Engine& engine(int step) {
    return *engines_[static_cast<std::size_t>(scenario_.steps[static_cast<std::size_t>(step)].engine)];
  }
  void create_engines(const LocalGroup& group);
  void begin(int step, const Pace& pace);
  /// Makes the call and, unless it is for later, sees it through.
  void issue(int step, Finish finish, const Call& call);
  void complete(int step, Finish finish);
  void put_error(int step, const Error& error);

  void play(int step, const RouteStep& what);
  void play(int step, const AdoptStep& what);
  void play(int step, const DispatchStep& what);
  void play(int step, const CombineStep& what);
  void play(int step, const LowLatencyDispatchStep& what);
  void play(int step, const LowLatencyCombineStep& what);
  void play(int step, const ReceiveStep& what);
  void play(int step, const WaitStep& what);
  void play(int step, const BarrierStep& what);
  void play(int step, const ZeroStep& what);
  void play(int step, const CloseStep& what);

  void put_handle(int step);
  /// On GPUs the source tokens arrive with the rows: put when they are there.
  void put_source(int step);
  void put_missing_source(int step);
  void put_missing_sources();
  /// `num_rows` < 0: as many as the step says.
  Rows dispatch_output(int step, const DispatchStep& what, std::int64_t num_rows = -1);
  /// What stands for rows that the engine made.
  Rows received_in_window(int step, const DispatchStep& what, const Rows& theirs);
  Ahead ahead_of(const DispatchStep& what) const;
  /// The dispatch of the next step makes this route too.
  bool is_made_by_dispatch(int route_step) const;
  /// False: more rows came than there was room for, and a dispatch must follow.
  bool dispatch_ahead(int step, const DispatchStep& what, const Rows& in);
  void put_received(int step, const DispatchStep& what, const Rows& out);
  TensorView combine_rows(int step, const CombineStep& what);
  ExpertSlabs slabs_for(int step, const LowLatencyDispatchStep& what);
  void put_slabs(int step, const LowLatencyDispatchStep& what);
  TensorView waited_statistics(int step);
  StreamRef stream() const { return mirror_->stream(); }
  void put_waited(int step, const TensorView& waited);

  const Scenario& scenario_;
  int rank_;
  Returned returned_;
  std::unique_ptr<Mirror> mirror_;
  std::vector<std::unique_ptr<Tensors>> made_up_;
  std::vector<Kept> kept_;
  std::vector<std::optional<Engine>> engines_;  ///< gone before what they gave: handles, rows, hooks, events
  RankOutputs outputs_;
  std::chrono::nanoseconds patience_{};
};

}  // namespace anyep::test
