// What the tests of the control plane share: a listener that remembers, and a bootstrap that things happen in.
#pragma once

#include <gtest/gtest.h>

#include <condition_variable>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "bootstrap/control.h"
#include "tests/unit/bootstrap_world.h"

namespace anyep::test {

class Recorder final : public control::Listener {
 public:
  void on_message(int peer, const control::Message& message) noexcept override {
    add([&] { messages_[peer].push_back(message); }, "message", peer);
  }
  void on_death(int peer, const char* how) noexcept override {
    add([&] { deaths_[peer].emplace_back(how); }, "death", peer);
  }
  void on_hangup(int peer) noexcept override {
    add([&] { ++hangups_[peer]; }, "hang-up", peer);
  }

  bool wait_messages(int peer, std::size_t count, std::chrono::nanoseconds limit = 10s) {
    return wait([&] { return messages_[peer].size() >= count; }, limit);
  }
  bool wait_death(int peer, std::chrono::nanoseconds limit = 10s) {
    return wait([&] { return !deaths_[peer].empty(); }, limit);
  }
  bool wait_hangup(int peer, std::chrono::nanoseconds limit = 10s) {
    return wait([&] { return hangups_[peer] > 0; }, limit);
  }
  std::vector<control::Message> messages(int peer) { return get(messages_, peer); }
  std::vector<std::string> deaths(int peer) { return get(deaths_, peer); }
  int hangups(int peer) { return get(hangups_, peer); }
  /// "message", "death" and "hang-up" of a peer, in the order of the calls.
  std::vector<std::string> order(int peer) { return get(order_, peer); }

 private:
  template <class F>
  void add(F&& change, const char* what, int peer) {
    const std::lock_guard lock(mutex_);
    change();
    order_[peer].emplace_back(what);
    changed_.notify_all();
  }
  template <class F>
  bool wait(F&& done, std::chrono::nanoseconds limit) {
    std::unique_lock lock(mutex_);
    return changed_.wait_until(lock, in(limit), done);
  }
  template <class Map>
  typename Map::mapped_type get(Map& map, int peer) {
    const std::lock_guard lock(mutex_);
    return map[peer];
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<int, std::vector<control::Message>> messages_;
  std::map<int, std::vector<std::string>> deaths_, order_;
  std::map<int, int> hangups_;
};

/// Another bootstrap, with something that happens right after its all-gather.
class Interrupted final : public Bootstrap {
 public:
  Interrupted(std::unique_ptr<Bootstrap> inner, std::function<void()> after)
      : inner_(std::move(inner)), after_(std::move(after)) {}
  int rank() const override { return inner_->rank(); }
  int num_ranks() const override { return inner_->num_ranks(); }
  void all_gather(std::span<const std::byte> mine, std::span<std::byte> all, Deadline deadline) override {
    inner_->all_gather(mine, all, deadline);
    after_();
  }

 private:
  std::unique_ptr<Bootstrap> inner_;
  std::function<void()> after_;
};

inline std::unique_ptr<control::Control> connect(const LocalGroup& group, int rank) {
  const auto bootstrap = group.member(rank);
  return control::Control::connect(*bootstrap, "create", in(20s));
}

inline control::Message message(std::uint32_t kind, const std::string& text = "") {
  control::Message made;
  made.kind = kind;
  text.copy(made.text, sizeof made.text - 1);
  return made;
}

/// Every rank has come here.
inline void meet_at(control::Control& control) {
  control.vote(nullptr, "test", in(20s));
}

}  // namespace anyep::test
