// What Engine asks of a backend. Calls arrive checked, one at a time and in order; each may throw Error.
#pragma once

#include <anyep/config.h>
#include <anyep/topology.h>
#include <anyep/types.h>

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "backend/state.h"
#include "core/buffers.h"
#include "core/layout.h"

namespace anyep::backend {

/// What every collective call carries.
struct Call {
  const char* op = "";
  unsigned kind = 0;         ///< of the mark's code: Op + 1
  std::uint32_t number = 0;  ///< counts the calls of an engine, an epoch
  std::uint64_t limit_ns = 0;
  std::uint64_t graph_limit_ns = 0;  ///< where the op is captured: its replays are not the engine's first op
  int num_sms = 0;                   ///< most SMs; 0 = the plan chooses
  StreamRef stream;                  ///< of backends that run on one
  std::array<std::uint64_t, core::kDescriptionWords> description{};  ///< equal on every rank
};

struct RouteCall {
  Routing routing;
  int num_experts = 0, top_k = 0;
  std::shared_ptr<Handle::State> handle;  ///< filled
};

struct DispatchCall {
  Rows x, out;
  std::shared_ptr<Handle::State> handle;
  core::RowFields fields;  ///< bytes of what travels
  int top_k = 0;
  std::int64_t room = 0;  ///< rows of out
  /// Where more rows come than that, nothing moves at this rank, and its next dispatch does this one's work. Only of
  /// backends that run on streams: others know the number.
  bool whole_or_nothing = false;
};

struct CombineCall {
  CombineInput in;
  Rows out;
  std::shared_ptr<Handle::State> handle;
  core::RowFields fields;
  std::int64_t hidden = 0;
};

/// Both halves of a low-latency op keep it.
struct LowLatencyCall {
  Call call;
  Shape shape;
  LowLatencyOptions options;
  TensorView x;  ///< dispatch input, or combine output
  Routing routing;
  ExpertSlabs slabs;
  std::uint32_t turn = 0;      ///< filled by the send half
  std::uint64_t start_ns = 0;  ///< likewise
};

class Backend {
 public:
  virtual ~Backend() = default;

  /// True: calls put their work on Call::stream and return, tensors lie in a device's memory, and record() tells when the
  /// work is done. False: calls do their work on the thread that makes them, tensors lie in host memory.
  virtual bool runs_on_stream() const { return false; }
  /// The call's stream goes on only once an event of a host's has ended; the caller does not wait.
  virtual void hold_back(const Call&, const Event::State&) {}
  /// The event that ends the op whose call was just made.
  virtual std::shared_ptr<Event::State> record(const Call&) { return nullptr; }
  /// A handle over arrays in this device's memory that the caller keeps alive by `owner`.
  virtual std::shared_ptr<Handle::State> adopt(const HandleArrays&, std::shared_ptr<const void> owner, StreamRef);
  /// What this rank's routing says. Local.
  virtual Layout layout(const Shape&, const Routing&, StreamRef);
  /// The same on the stream, into arrays in this device's memory.
  virtual void layout_into(const Shape&, const Routing&, const LayoutArrays&, StreamRef);

  virtual void route(const Call&, const RouteCall&) = 0;
  virtual void dispatch(const Call&, const DispatchCall&) = 0;
  /// What route_and_dispatch() asks for when the route is on its stream: null = no dispatch.
  struct DispatchLater {
    bool whole_or_nothing = false;
    std::function<const DispatchCall*()> make;
  };
  /// Both on the stream, one right behind the other; one record() serves both. An error with `route.handle->routed` not set
  /// is the route's; else the route is on its stream, recorded, and the error is the dispatch's.
  virtual void route_and_dispatch(const Call& route_call, const RouteCall& route, const Call&, const DispatchLater&);
  /// The counts have told how a dispatch of whole_or_nothing ends: its rows go to `out`, or nowhere.
  virtual void settle(const DispatchCall&) {}
  virtual void combine(const Call&, const CombineCall&) = 0;
  virtual void low_latency_dispatch_send(LowLatencyCall&) = 0;
  virtual void low_latency_dispatch_receive(LowLatencyCall&) = 0;
  virtual void low_latency_combine_send(LowLatencyCall&) = 0;
  virtual void low_latency_combine_receive(LowLatencyCall&) = 0;
  virtual void barrier(const Call&) = 0;

  virtual std::unique_ptr<OwnedRows::State> make_rows(std::int64_t num_rows, const Shape&) = 0;
  /// The same for the work of a stream, which may be in a capture.
  virtual std::unique_ptr<OwnedRows::State> make_rows_on(std::int64_t num_rows, const Shape& shape, StreamRef) {
    return make_rows(num_rows, shape);
  }
  /// The same where that needs no growth and no wait; else null.
  virtual std::unique_ptr<OwnedRows::State> make_rows_if_free(std::int64_t, const Shape&, StreamRef) { return nullptr; }
  virtual TensorView combine_buffer(const Shape&) = 0;
  virtual TensorView memory(Mode, std::size_t offset, std::size_t bytes) = 0;
  virtual std::shared_ptr<const void> hold_memory() = 0;
  virtual std::vector<int> masks() const = 0;
  virtual void copy_masks(const TensorView& out, StreamRef) const;
  virtual void mask(int rank) = 0;
  virtual void unmask(int rank) = 0;

  /// Makes the engine fail with this error, for its peers too. The first one stays.
  virtual void fail(const Error&) noexcept = 0;
  virtual std::optional<Error> first_error() const = 0;
  virtual void refused(std::uint32_t call, const Error&) noexcept = 0;
  /// Says goodbye and waits for the peers', within the close limit; the ranks that did not come. Releases everything.
  virtual std::vector<int> close() = 0;

  virtual std::uint64_t ids_out_of_range() const = 0;
};

/// The backends that this build has; the only place that names them. @throws Error kUnsupported
std::unique_ptr<Backend> make_backend(const Budget&, const Topology&, const Tuning&, Bootstrap&);

}  // namespace anyep::backend
