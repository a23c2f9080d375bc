// The collective exchanges over the links, before the watcher starts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "bootstrap/frames.h"

namespace anyep::control {

class SetUp {
 public:
  /// `links` must outlive this.
  SetUp(int rank, std::vector<Link>& links) : rank_(rank), links_(links) {}

  void all_gather(const Step& step, std::span<const std::byte> mine, std::span<std::byte> all);
  std::vector<std::vector<UniqueFd>> exchange_fds(const Step& step, std::span<const int> mine);

 private:
  struct Peer;
  struct Exchange;

  void run(Exchange& exchange);
  void move(Exchange& exchange);
  bool send_some(Exchange& exchange, Peer& peer);
  bool receive_some(Exchange& exchange, Peer& peer);
  void take_data(Exchange& exchange, Peer& peer, std::span<const std::byte> bytes);
  void wait(const Exchange& exchange) const;

  int rank_;
  std::vector<Link>& links_;
  std::uint32_t operation_ = 0;
  bool failed_ = false;
  std::vector<std::byte> buffer_;
};

}  // namespace anyep::control
