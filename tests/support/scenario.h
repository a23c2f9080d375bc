// A test's story as data: what every rank does, step by step. Any world can play it (world.h).
#pragma once

#include <anyep/config.h>
#include <anyep/types.h>

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "support/choices.h"
#include "support/payload.h"

namespace anyep::test {

enum class Ids : std::uint8_t { kInt32, kInt64 };
enum class Memory : std::uint8_t { kTensor, kWindow };
enum class Finish : std::uint8_t {
  kWait,   ///< Options::wait
  kEvent,  ///< the event is waited for at once
  kPoll,   ///< nobody waits: the op must end while the caller only looks at done()
  kLater   ///< a later WaitStep
};
/// How a rank makes its calls of route and dispatch. All mean the same to the peers, who may choose otherwise.
enum class Ahead : std::uint8_t {
  kNo,           ///< route, then dispatch with rows of exact size
  kOwnRows,      ///< dispatch_fresh, which makes the rows
  kGivenRows,    ///< dispatch_fresh into rows for every token of every rank
  kNoRoom,       ///< dispatch_fresh into no rows at all; then dispatch, if any come
  kBehindRoute,  ///< route, dispatch_ahead into rows for every token of every rank
  kBehindNoRoom  ///< route, dispatch_ahead into no rows at all; then dispatch, if any come
};
/// How the scales of dispatch lie in the caller's memory.
enum class Strides : std::uint8_t { kDense, kColumns, kPadded, kBroadcast };

/// Steps name earlier steps by their index. A field per rank may stay empty: then every rank has the default.

struct RouteStep {
  Choices choices = {};
  Ids ids = Ids::kInt64;
  enum class Given : std::uint8_t {
    kExperts,
    kAll,         ///< experts, and the ranks and pairs that follow from them
    kOtherRanks,  ///< experts, but ranks that do not follow from them, and no pairs
    kOnlyRanks    ///< such ranks, without experts
  } given = Given::kExperts;
  Finish finish = Finish::kEvent;  ///< kLater: what the handle says is read in the WaitStep
};

/// A handle from copies of the arrays of another one.
struct AdoptStep {
  int handle = 0;
};

struct DispatchStep {
  int handle = 0;
  DType dtype = DType::kBF16;
  std::int64_t hidden = 64;
  Fill fill = Fill::kBits;
  int num_scales = 0;
  DType scale_type = DType::kF32;
  Strides scale_strides = Strides::kDense;
  std::vector<std::int64_t> extra = {};  ///< bytes per row of each extra payload
  bool with_experts = true;
  bool with_weights = true;
  std::size_t misaligned = 0;               ///< bytes that x and out lie past a multiple of 64
  std::vector<Memory> out = {};             ///< per rank
  std::vector<std::int64_t> out_rows = {};  ///< per rank; none: exactly num_rows()
  /// Per rank. The step before it is the route, finishes kLater, and a WaitStep for it follows.
  std::vector<Ahead> ahead = {};
  Finish finish = Finish::kWait;
};

struct CombineStep {
  int handle = 0;
  DType dtype = DType::kBF16;
  std::int64_t hidden = 64;
  int num_biases = 0;
  bool only_second_bias = false;
  std::int64_t weights = 0;       ///< columns
  int rows_of = -1;               ///< combines what that DispatchStep received, where it lies
  std::vector<Memory> in = {};    ///< per rank
  std::int64_t surplus_rows = 0;  ///< rows of x beyond those of the handle
  std::size_t misaligned = 0;
  Finish finish = Finish::kWait;
};

struct LowLatencyDispatchStep {
  Choices choices = {};
  Ids ids = Ids::kInt64;
  std::int64_t hidden = 128;
  std::int64_t max_tokens = 0;  ///< 0: the most that a rank brings
  Fill fill = Fill::kFinite;
  Wire wire = Wire::kBF16;
  bool round_scale = false;
  bool hook = false;  ///< a later ReceiveStep
  bool statistics = false;
  Finish finish = Finish::kWait;
};

struct LowLatencyCombineStep {
  int dispatch = 0;
  std::int64_t hidden = 0;  ///< 0: that of dispatch
  Wire wire = Wire::kBF16;
  bool zero_copy = false;
  bool hook = false;
  bool statistics = false;
  Finish finish = Finish::kWait;
};

/// The receive half of a low-latency step with a hook.
struct ReceiveStep {
  int step = 0;
};
/// Waits for one kLater step.
struct WaitStep {
  int step = 0;
};
struct BarrierStep {};
/// Every rank zeroes its engine's payload memory, between two barriers.
struct ZeroStep {};
struct CloseStep {};

using What = std::variant<RouteStep, AdoptStep, DispatchStep, CombineStep, LowLatencyDispatchStep,
                          LowLatencyCombineStep, ReceiveStep, WaitStep, BarrierStep, ZeroStep, CloseStep>;

/// When ranks begin a step.
struct Pace {
  int delayed = -1;  ///< this rank sleeps `delay_ms` first
  int delay_ms = 0;
  int held = -1;        ///< this rank begins only when
  int until = -1;       ///< this one's call has returned
  int after_step = -1;  ///< the op is ordered after the event of that step
  /// The op is ordered after an event that each caller completes once the call has returned.
  bool after_manual = false;
};

struct Step {
  What what;
  int engine = 0;
  Pace pace;
};

struct Scenario {
  int num_ranks = 1;
  int num_engines = 1;
  std::uint64_t seed = 1;
  std::int64_t rows_bytes = std::int64_t{64} << 20;
  bool exact_combine = false;
  bool checked = false;
  bool counts_ids = false;   ///< also asks how many ids were out of range; its dispatches bring none
  std::uint64_t jitter = 0;  ///< not 0: every rank sleeps a random time, 0 to 2 ms, before every third step or so
  int num_sms = 0;           ///< of every op
  std::vector<Step> steps;

  /// Adds a step; its index names it.
  int then(What what, const Pace& pace = {}, int engine = 0) {
    steps.push_back({std::move(what), engine, pace});
    return static_cast<int>(steps.size()) - 1;
  }
  template <class T>
  const T& step(int index) const {
    return std::get<T>(steps[static_cast<std::size_t>(index)].what);
  }
  /// The RouteStep behind a handle.
  const RouteStep& route_of(int handle) const;
  /// What the rows of one step are made from.
  std::uint64_t key(int step) const { return mix(seed, static_cast<std::uint64_t>(step)); }
  /// The shape that a low-latency step passes; for combine M, experts and top-k are those of its dispatch.
  Shape shape_of(const LowLatencyDispatchStep& step) const;
  Shape shape_of(const LowLatencyCombineStep& step) const;
  /// What the engines need for the low-latency steps.
  std::int64_t low_latency_bytes() const;
};

/// "dispatch", "route", ...
std::string name_of(const Step& step);

}  // namespace anyep::test
