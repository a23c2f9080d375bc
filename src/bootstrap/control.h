// The lasting links between the ranks of one host: set-up exchanges, short messages, and how a peer's death is learnt.
// Data never goes this way. Used by the engine; everything here is local to this host.
#pragma once

#include <anyep/bootstrap.h>
#include <anyep/error.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "bootstrap/unique_fd.h"

namespace anyep::control {

using bootstrap::UniqueFd;

/// What ranks tell each other after set-up. Kinds are the engine's. One message is one packet: it arrives whole or not
/// at all.
struct Message {
  std::uint32_t kind = 0;
  std::uint32_t reserved = 0;
  std::uint64_t generation = 0, a = 0, b = 0;
  char text[224] = {};  ///< zero-terminated, else cut by the receiver
};
static_assert(sizeof(Message) == 256);

/// Called by the watcher thread only. Must not block for long, and must not call Control::stop().
/// Per peer, in this order: any messages, then at most one of on_death and on_hangup, then nothing more.
struct Listener {
  virtual ~Listener() = default;
  virtual void on_message(int peer, const Message& message) noexcept = 0;
  /// The process of this peer is going or gone; messages that it had sent were delivered first.
  /// `how` noticed: "robust mutex", "pidfd", "hang-up" (the last where the process cannot be seen from here).
  virtual void on_death(int peer, const char* how) noexcept = 0;
  /// The peer closed its link (stop()) and its process lives. Whether that was announced, the listener knows.
  virtual void on_hangup(int peer) noexcept = 0;
};

/// A full mesh of Unix sockets between ranks of one host, as threads or as processes.
/// Order of use: connect; set-up exchanges, the same ones on every rank; start; tell; stop.
/// One thread at a time, except tell(), tell_all() and the accessors, which any thread may call at any time.
class Control {
 public:
  /// Collective. `op` names the caller in errors ("create").
  /// @throws Error kMismatch where two ranks claim one place or differ in their number or version (on every rank),
  /// kTimeout naming who is missing, kPeerDead, kAborted (a peer gave up; its text), kResource. Nothing is left behind
  /// on failure.
  static std::unique_ptr<Control> connect(Bootstrap& bootstrap, std::string_view op, Deadline deadline);
  ~Control();
  Control(const Control&) = delete;
  Control& operator=(const Control&) = delete;

  int rank() const noexcept;
  int num_ranks() const noexcept;
  /// 16 random bits, never zero, equal on all ranks: drawn by rank 0.
  std::uint64_t generation() const noexcept;
  bool same_process(int peer) const noexcept;
  /// As seen from here; 0 where the peer lives in a pid namespace that cannot be seen.
  std::int64_t pid(int peer) const noexcept;
  /// Connections at the rendezvous that were not a rank of this job, and were dropped.
  std::uint64_t num_strangers() const noexcept;

  // Set-up exchanges, before start(). Collective, in the same order on every rank. A rank that fails in one tells its
  // peers, which then throw the same code with that rank's text; afterwards only destruction is left.
  // @throws Error kTimeout naming who is missing, kPeerDead, kAborted (a peer closed its links), kMismatch (sizes
  // differ)

  /// all = every rank's `mine`, in rank order.
  void all_gather(std::span<const std::byte> mine, std::span<std::byte> all, Deadline deadline);
  /// Every rank's descriptors, [rank][index], close-on-exec; equal counts. Own entries are empty; those of ranks in
  /// this process are duplicates.
  std::vector<std::vector<UniqueFd>> exchange_fds(std::span<const int> mine, Deadline deadline);
  /// All or none: every rank brings success (null) or its error. If any failed, throws on every rank one Error that
  /// lists all causes by rank, with the code and fields of the own error or else the code of the lowest failing rank.
  void vote(const Error* mine, std::string_view op, Deadline deadline);

  /// Makes all of the watcher that can fail, its thread included; nothing is delivered before start(). For the time before
  /// the last vote, so that no rank goes on while another cannot. @throws Error kResource
  void prepare(Listener& listener);
  /// Starts the watcher (none in a group of one); prepares it first where that was not done, and then throws alike. The
  /// listener must live until stop() has returned. When it returns, the peers can notice this process's death.
  void start(Listener& listener);

  /// Any thread, never waits. False: the peer is gone, or its link is full (it has not read hundreds of messages).
  bool tell(int peer, const Message& message) noexcept;
  void tell_all(const Message& message) noexcept;

  /// Joins the watcher and closes everything. Idempotent; also done by the destructor. Waits for no peer; messages told
  /// before still arrive. In a forked child it closes the copied descriptors and leaves the parent's links alone.
  void stop() noexcept;

 private:
  struct State;
  explicit Control(std::unique_ptr<State> state) noexcept;
  std::unique_ptr<State> state_;
};

}  // namespace anyep::control
