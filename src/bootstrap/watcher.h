// The thread that reads messages from the links and learns of deaths.
#pragma once

#include <pthread.h>

#include <chrono>
#include <cstdint>
#include <future>
#include <semaphore>
#include <vector>

#include "bootstrap/control.h"
#include "bootstrap/frames.h"
#include "bootstrap/life.h"
#include "bootstrap/packet.h"

namespace anyep::control {

class Watcher {
 public:
  /// All of it must outlive stop().
  struct World {
    int rank;
    const std::vector<Link>& links;
    const std::vector<PeerLife>& lives;  ///< none for ranks in this process
    OwnLife& own;
    Listener& listener;
  };
  /// Starts the thread and waits until it holds the mutex that peers look at; it then waits for go(). @throws Error
  /// kResource
  explicit Watcher(const World& world);
  ~Watcher() { stop(); }
  Watcher(const Watcher&) = delete;
  Watcher& operator=(const Watcher&) = delete;

  /// Lets it listen. Once.
  void go() noexcept {
    listens_ = true;
    go_.release();
  }
  /// Ends the thread. Idempotent.
  void stop() noexcept;
  /// In a forked child, where there is no such thread.
  void forget() noexcept { running_ = false; }

 private:
  using Clock = std::chrono::steady_clock;
  enum class State : std::uint8_t {
    kLinked,
    kHungUp,  ///< the link is closed; whether by a death will be known in a moment
    kGone     ///< reported
  };
  struct Peer {
    State state = State::kGone;
    Clock::time_point hung_up;
  };

  void start_thread();
  void run() noexcept;
  bool handle_events() noexcept;
  int timeout_ms() const noexcept;
  void look() noexcept;
  void read_messages(int peer) noexcept;
  Io read_one(int peer) noexcept;
  void hang_up(int peer) noexcept;
  void judge(int peer) noexcept;
  bool left(int peer) const noexcept;
  const char* death_of(int peer) const noexcept;
  void report_death(int peer, const char* how) noexcept;
  void leave_epoll(int peer) noexcept;
  const Link& link(int peer) const noexcept { return world_.links[static_cast<std::size_t>(peer)]; }
  const PeerLife& life(int peer) const noexcept { return world_.lives[static_cast<std::size_t>(peer)]; }
  Peer& state(int peer) noexcept { return peers_[static_cast<std::size_t>(peer)]; }

  World world_;
  std::vector<Peer> peers_;
  UniqueFd epoll_, wake_;
  std::promise<bool> started_;
  std::counting_semaphore<2> go_{0};
  bool listens_ = false;  ///< read by the thread behind go_: what peers send before is not for it
  pthread_t thread_{};
  bool running_ = false;
};

}  // namespace anyep::control
