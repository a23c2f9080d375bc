// How ranks meet: in Topology::discover() and Engine::create() only. Callers may bring their own.
#pragma once

#include <anyep/types.h>

#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <vector>

namespace anyep {

using Deadline = std::chrono::steady_clock::time_point;

struct ANYEP_API Bootstrap {
  virtual ~Bootstrap();
  virtual int rank() const = 0;
  virtual int num_ranks() const = 0;
  /// all = every rank's `mine`, in rank order; equal sizes. Collective.
  /// @throws Error kTimeout at the deadline, kPeerDead where a death can be seen.
  virtual void all_gather(std::span<const std::byte> mine, std::span<std::byte> all, Deadline) = 0;
};

/// Embeds any all-gather the caller has (MPI, torch.distributed, ...). The callback gets equal sizes on every rank.
class ANYEP_API CallbackBootstrap final : public Bootstrap {
 public:
  using AllGather = std::function<void(std::span<const std::byte> mine, std::span<std::byte> all)>;
  CallbackBootstrap(int rank, int num_ranks, AllGather all_gather);
  int rank() const override;
  int num_ranks() const override;
  void all_gather(std::span<const std::byte> mine, std::span<std::byte> all, Deadline) override;

 private:
  int rank_, num_ranks_;
  AllGather all_gather_;
};

/// Ranks of one host that were started together, as threads or as forked processes: made once, before they start.
class ANYEP_API LocalGroup {
 public:
  explicit LocalGroup(int num_ranks);
  ~LocalGroup();
  LocalGroup(LocalGroup&&) noexcept;
  LocalGroup& operator=(LocalGroup&&) noexcept;

  int num_ranks() const;
  /// The bootstrap of one rank; called by that rank's thread or process. Several engines may use it, one after another.
  /// A process that ends while it holds one is a death at once; one that has let go of it before, after two seconds in
  /// which no other process has taken the rank. A rank that never came is waited for to the limit.
  std::unique_ptr<Bootstrap> member(int rank) const;
  /// A new group without the given ranks (dead, or not wanted); the others are numbered anew, ascending. Every one of them
  /// calls it with the same list. May be repeated.
  std::unique_ptr<Bootstrap> member_without(int rank, std::span<const int> gone) const;

  /// Runs `body(rank)` in one forked process per rank; returns each one's exit status (wait status encoding of waitpid).
  /// An exception that leaves `body` is written to standard error and gives exit status 1.
  static std::vector<int> run_processes(int num_ranks, const std::function<void(int rank)>& body);
  /// Runs `body(rank)` in one thread per rank; rethrows the lowest rank's exception when all have ended.
  static void run_threads(int num_ranks, const std::function<void(int rank)>& body);

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace anyep
