// One group of ranks, both modes, one queue, one watcher.
#pragma once

#include <anyep/bootstrap.h>
#include <anyep/config.h>
#include <anyep/error.h>
#include <anyep/event.h>
#include <anyep/handle.h>
#include <anyep/plan.h>
#include <anyep/topology.h>
#include <anyep/types.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace anyep {

/// What becomes of rows beyond those that a dispatch has room for.
enum class Surplus : std::uint8_t {
  kMovesLater,  ///< then no row moves, `Fresh::dispatched` is false, and the next call is a dispatch() with more room
  kDropped,     ///< and kCapacity is given at the event; the host does not wait
};

/// A dispatch that was put on its stream before the number of its rows was known.
struct Fresh {
  Handle handle;   ///< with Surplus::kMovesLater its counts are known
  OwnedRows rows;  ///< of exact size, where the call made them
  Event event;
  bool dispatched = true;
  std::uint64_t waited_ns = 0;  ///< by the host, for the counts
};

/// One caller at a time (a second one gets kState). Calls are collective, in the same order on every rank, and run in that
/// order. A rank on a GPU (Topology::device) finds tensors in that GPU's memory and puts its work on the caller's stream: a
/// call returns when it is launched, the next one waits for it on whatever stream it comes, and calls may be captured into
/// graphs; the host waits only for counts, for events and where Options::wait says so. On CPU ranks the stream is ignored:
/// the caller's own thread runs an op that it waits for anyway when the queue is empty; a worker thread serves asynchronous
/// ones; a hook runs the receive half on the thread that calls it. Asynchronous inputs and outputs must stay alive and
/// inputs unchanged until the event.
class ANYEP_API Engine {
 public:
  class Core;
  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) noexcept;
  ~Engine();  ///< waits for no peer and releases what is local; tells peers "leaving" if close() was not called

  /// Collective, all or none: one rank's failure is thrown on every rank, with the causes, and nothing is left behind.
  static Engine create(const Budget&, const Topology&, const Tuning&, Bootstrap&);

  /// Counts, exchanges counts, fixes every place. Asynchronous. An id out of range counts as -1; checked mode throws.
  /// Of `shape` only num_experts and top_k matter.
  Handle route(const Shape&, const Routing&, StreamRef = {}, const Options& = {});

  /// Rows in the window, where peers can write and gather. On a GPU `stream` tells whether they belong to a capture: those go
  /// to no other call as long as the engine lives. @throws Error kCapacity: need and have of the budget.
  OwnedRows make_rows(std::int64_t num_rows, const Shape&, StreamRef stream = {});

  /// Sends each token once to every rank that the handle names. Asynchronous. `out` has num_rows() rows, or any number when
  /// the host must not wait: experts is -1 past the last row, the rest there is unspecified; fewer rows than needed drop the
  /// surplus and give kCapacity at the event. `x.experts` (global ids) and `x.weights` are optional and travel with the rows;
  /// ids need a handle from route(), an adopted one does not know the number of experts.
  /// @throws Error kArgument, kCapacity, kState before anything is queued; others at the event
  /// @post row i of out.x is bit for bit the row of token source()[i] on the rank whose range holds i
  Event dispatch(const Rows& x, const Handle&, const Rows& out, StreamRef = {}, const Options& = {});

  /// route() and dispatch() as one, into rows of exact size that the call makes. Peers may make the two calls instead. On a
  /// GPU the rows begin to move before the host knows how many they are, where the window has free room for rows_ahead();
  /// the host waits for the counts meanwhile, and gives back the room that was not needed. Scales come as float32.
  /// @throws Error as route() and dispatch()
  Fresh dispatch_fresh(const Shape&, const Routing&, const Rows& x, StreamRef = {}, const Options& = {});
  /// The same into rows that the caller has made ahead. With Surplus::kMovesLater those past the last are unspecified.
  Fresh dispatch_fresh(const Shape&, const Routing&, const Rows& x, const Rows& out, Surplus, StreamRef = {},
                       const Options& = {});
  /// The same into rows that `out` makes, asked once, on this thread, while the counts are on their way: finding memory takes
  /// the host about as long. It may call rows_ahead() and make_rows_ahead() and nothing else of the engine. Rows without x: none
  /// move, as if this were route(). An Error that it throws is the dispatch's.
  Fresh dispatch_fresh(const Shape&, const Routing&, const Rows& x, const std::function<Rows()>& out, Surplus,
                       StreamRef = {}, const Options& = {});
  /// dispatch() behind a route() whose counts nobody has waited for, with Surplus::kMovesLater. `Fresh::handle` stays empty.
  Fresh dispatch_ahead(const Rows& x, const Handle&, const Rows& out, StreamRef = {}, const Options& = {});
  /// Rows that may come for this rank's `num_tokens`: each rank's tokens once, when none has more than this rank or than any
  /// had when this engine last looked. A guess: nobody knows the others' numbers before the exchange.
  std::int64_t rows_ahead(std::int64_t num_tokens) const;
  /// make_rows() where that needs no growth of the window and no wait; else no rows. On a GPU only.
  OwnedRows make_rows_ahead(std::int64_t num_rows, const Shape&, StreamRef = {});

  /// out.x[token] = bias + the sum, over ranks ascending, of that rank's row for it: FP32, rounded once, unweighted.
  /// out.weights likewise when in.weights is given.
  Event combine(const CombineInput& in, const Handle&, const Rows& out, StreamRef = {}, const Options& = {});

  /// x [num_tokens, hidden] bfloat16 to slabs of bfloat16 or FP8 (options.wire). routing.experts is required.
  Pending low_latency_dispatch(const Shape&, const TensorView& x, const Routing&, const ExpertSlabs& out,
                               StreamRef = {}, const LowLatencyOptions& = {});
  /// in: x, source and range as dispatch gave them; routing: experts and weights; out [num_tokens, hidden] bfloat16.
  Pending low_latency_combine(const Shape&, const ExpertSlabs& in, const Routing&, const TensorView& out,
                              StreamRef = {}, const LowLatencyOptions& = {});
  /// Zero copy: [local_experts, num_ranks * max_tokens, hidden] bfloat16; local, one address for the engine's life.
  TensorView combine_buffer(const Shape&);

  Layout layout(const Shape&, const Routing&, StreamRef = {});  ///< local
  /// Local, on a GPU's stream; the host does not wait. @throws Error kUnsupported on CPU ranks
  void layout(const Shape&, const Routing&, const LayoutArrays& out, StreamRef = {});
  /// A handle over arrays in this engine's GPU memory, which `owner` keeps alive and the stream has filled. Kernels check bounds; values that no
  /// route has given make wrong results, never foreign writes. @throws Error kArgument, kUnsupported on CPU ranks
  Handle adopt(const HandleArrays&, std::shared_ptr<const void> owner, StreamRef = {});
  void barrier(StreamRef = {});  ///< of unmasked ranks; on a GPU what follows on the stream waits, the host does not
  /// Instead of a collective call whose arguments the caller itself found wrong: takes the call's number and tells the
  /// peers, which get kAborted with the text instead of waiting for this rank.
  void refuse(Op op, const std::string& why);
  void masks(const TensorView& out, StreamRef = {});  ///< int32 [num_ranks], 1 = masked
  void mask(int rank, StreamRef = {});                ///< low latency only, local, Budget::masks
  void unmask(int rank, StreamRef = {});  ///< asks the peer; takes effect on both sides at a turn both agreed on
  TensorView memory(Mode, std::size_t offset, std::size_t bytes);  ///< a view of own payload: the mode's whole budget
  /// While it is held, what memory() and combine_buffer() have shown stays mapped, also after close() and the engine's end.
  std::shared_ptr<const void> hold_memory();

  void check() const;  ///< never waits; throws this engine's first error, every time
  /// Tells the peers why this rank leaves: they get kAborted with the text. The engine has failed afterwards.
  void abandon(const std::string& why) noexcept;
  void close();  ///< waits for every peer's closing word, at most close_timeout, and names who did not come

  int rank() const;
  int num_ranks() const;
  const Topology& topology() const;
  std::uint64_t ids_out_of_range() const;  ///< ids treated as -1 so far

 private:
  explicit Engine(std::unique_ptr<Core> core);
  std::unique_ptr<Core> core_;
};

}  // namespace anyep
