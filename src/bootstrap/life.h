// Pages by which ranks tell that they live. Each holds a robust mutex that the owner's watcher thread locks for its
// life: the kernel marks its word as soon as that thread begins to exit, while process descriptors and sockets tell
// only after the process's memory has been given back (about 80 ms per GiB).
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>

#include "bootstrap/unique_fd.h"

namespace anyep::control {

enum class LifeStage : std::uint32_t {
  kSetUp,    ///< the mutex is not locked yet
  kWatched,  ///< locked
  kStopped   ///< unlocked on purpose
};

struct LifePage;

/// This rank's own page, in a memfd that nobody else can write.
class OwnLife {
 public:
  /// @throws Error kResource
  OwnLife();
  ~OwnLife();
  OwnLife(const OwnLife&) = delete;
  OwnLife& operator=(const OwnLife&) = delete;

  int fd() const noexcept { return memory_.get(); }
  /// By the watcher thread. False: this C library keeps the word elsewhere, so peers would not see a death.
  bool begin() noexcept;
  /// By the same thread, before it ends on purpose.
  void end() noexcept;
  /// In a forked child: the page stays as it is, for it is the parent's.
  void forget() noexcept { owner_ = false; }

 private:
  bootstrap::UniqueFd memory_;
  LifePage* page_ = nullptr;
  bool owner_ = true;
};

/// A peer's page, read-only.
class PeerLife {
 public:
  PeerLife() = default;
  /// @throws Error kCorrupt: no such page; kResource
  explicit PeerLife(int fd);
  ~PeerLife();
  PeerLife(PeerLife&& other) noexcept;
  PeerLife& operator=(PeerLife&& other) noexcept;

  explicit operator bool() const noexcept { return page_ != nullptr; }
  /// Its watcher thread is gone without a word.
  bool died() const noexcept;
  LifeStage stage() const noexcept;

 private:
  const LifePage* page_ = nullptr;
};

}  // namespace anyep::control
