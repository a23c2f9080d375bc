#include "bootstrap/setup.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <iterator>
#include <utility>

#include "bootstrap/packet.h"
#include "core/check.h"

namespace anyep::control {
namespace {

using Clock = std::chrono::steady_clock;

}  // namespace

struct SetUp::Peer {
  int rank;
  bool sent = false, received = false;  ///< all of it, at least one packet
  std::size_t sent_bytes = 0, received_bytes = 0;
};

struct SetUp::Exchange {
  const Step& step;
  std::span<const std::byte> mine;
  std::span<std::byte> all;
  std::span<const int> fds = {};
  std::vector<std::vector<UniqueFd>>* all_fds = nullptr;
  std::vector<Peer> peers = {};

  std::vector<int> missing() const {
    std::vector<int> ranks;
    for (const Peer& peer : peers) {
      if (!peer.received) ranks.push_back(peer.rank);
    }
    return ranks;
  }
  bool done() const {
    return std::ranges::all_of(peers, [](const Peer& peer) { return peer.sent && peer.received; });
  }
};

void SetUp::all_gather(const Step& step, std::span<const std::byte> mine, std::span<std::byte> all) {
  if (all.size() != mine.size() * links_.size()) {
    core::throw_argument(step.op, "all.size()", fmt::to_string(all.size()),
                         fmt::format("{} ranks x {} bytes", links_.size(), mine.size()));
  }
  std::ranges::copy(mine, all.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(rank_) * mine.size()));
  Exchange exchange{step, mine, all};
  run(exchange);
}

std::vector<std::vector<UniqueFd>> SetUp::exchange_fds(const Step& step, std::span<const int> mine) {
  std::vector<std::vector<UniqueFd>> all(links_.size());
  std::size_t at = 0;
  do {
    const std::size_t count = std::min(kMaxPacketFds, mine.size() - at);
    Exchange exchange{step, {}, {}, mine.subspan(at, count), &all};
    run(exchange);
    at += count;
  } while (at < mine.size());
  all[static_cast<std::size_t>(rank_)].resize(mine.size());
  return all;
}

void SetUp::run(Exchange& exchange) {
  if (failed_) core::throw_error(ErrorCode::kState, exchange.step.op, "an earlier exchange of this set-up has failed");
  buffer_.resize(sizeof(DataFrame) + kMaxPayloadBytes);
  for (int peer = 0; peer < static_cast<int>(links_.size()); ++peer) {
    if (peer != rank_) exchange.peers.push_back({peer});
  }
  failed_ = true;
  try {
    move(exchange);
  } catch (const Error& error) {
    // Peers read the first last word only; one that was passed on comes before this.
    send_abort(links_, abort_frame(error, rank_));
    throw;
  }
  failed_ = false;
  ++operation_;
}

void SetUp::move(Exchange& exchange) {
  while (true) {
    for (Peer& peer : exchange.peers) {
      while (send_some(exchange, peer)) {
      }
      while (receive_some(exchange, peer)) {
      }
    }
    if (exchange.done()) return;
    if (Clock::now() >= exchange.step.deadline) {
      std::vector<int> missing = exchange.missing();
      if (missing.empty()) {
        for (const Peer& peer : exchange.peers) {
          if (!peer.sent) missing.push_back(peer.rank);
        }
      }
      bootstrap::throw_missing(exchange.step, std::move(missing), "take part");
    }
    wait(exchange);
  }
}

void SetUp::wait(const Exchange& exchange) const {
  std::vector<pollfd> entries;
  for (const Peer& peer : exchange.peers) {
    const int events = (peer.sent ? 0 : POLLOUT) | (peer.received ? 0 : POLLIN);
    const int socket = links_[static_cast<std::size_t>(peer.rank)].socket.get();
    if (events != 0) entries.push_back({socket, static_cast<short>(events), 0});
  }
  // Looks at the clock now and then in any case: a far deadline does not fit poll()'s milliseconds.
  const auto limit = std::min<Clock::duration>(std::chrono::seconds(1), exchange.step.deadline - Clock::now());
  const auto milliseconds = std::chrono::ceil<std::chrono::milliseconds>(limit).count();
  ::poll(entries.data(), entries.size(), static_cast<int>(std::max<std::int64_t>(0, milliseconds)));
}

// False: nothing more to do now.
bool SetUp::send_some(Exchange& exchange, Peer& peer) {
  if (peer.sent) return false;
  const std::size_t count = std::min(kMaxPayloadBytes, exchange.mine.size() - peer.sent_bytes);
  DataFrame frame;
  frame.operation = operation_;
  frame.num_fds = static_cast<std::uint32_t>(exchange.fds.size());
  frame.size = exchange.mine.size();
  frame.offset = peer.sent_bytes;
  const int socket = links_[static_cast<std::size_t>(peer.rank)].socket.get();
  switch (send_packet(socket, bytes_of(frame), exchange.mine.subspan(peer.sent_bytes, count), exchange.fds)) {
    case Io::kAgain:
      return false;
    case Io::kClosed:
      peer.sent = true;  // receiving will tell why
      return false;
    case Io::kDone:
      break;
  }
  peer.sent_bytes += count;
  peer.sent = peer.sent_bytes == exchange.mine.size();
  return !peer.sent;
}

bool SetUp::receive_some(Exchange& exchange, Peer& peer) {
  if (peer.received) return false;
  Packet packet = receive_packet(links_[static_cast<std::size_t>(peer.rank)].socket.get(), buffer_);
  if (packet.io == Io::kAgain) return false;
  if (packet.io == Io::kClosed) throw_lost(exchange.step, peer.rank, links_);
  const auto bytes = std::span<const std::byte>(buffer_).first(packet.bytes);
  AbortFrame last_word;
  if (read_frame(bytes, FrameKind::kAbort, &last_word)) {
    send_abort(links_, last_word);
    throw_abort(exchange.step, last_word, static_cast<int>(links_.size()));
  }
  take_data(exchange, peer, bytes);
  if (packet.num_fds != exchange.fds.size()) {
    core::throw_resource(exchange.step.op, fmt::format("taking descriptors of rank {}", peer.rank), EMFILE,
                         exchange.fds.size(), packet.num_fds);
  }
  if (exchange.all_fds != nullptr) {
    auto& fds = (*exchange.all_fds)[static_cast<std::size_t>(peer.rank)];
    std::ranges::move(std::span(packet.fds).first(packet.num_fds), std::back_inserter(fds));
  }
  return !peer.received;
}

void SetUp::take_data(Exchange& exchange, Peer& peer, std::span<const std::byte> bytes) {
  const auto refuse = [&](ErrorCode code, std::string_view text) {
    bootstrap::throw_about(exchange.step, code, {peer.rank}, fmt::format("rank {} {}", peer.rank, text));
  };
  DataFrame frame;
  if (!read_frame(bytes, FrameKind::kData, &frame)) refuse(ErrorCode::kCorrupt, "sent no frame of a set-up exchange");
  const auto payload = bytes.subspan(sizeof frame);
  if (frame.operation != operation_) {
    refuse(ErrorCode::kMismatch, fmt::format("is in set-up exchange {}, this rank in {}", frame.operation, operation_));
  }
  if (frame.size != exchange.mine.size()) {
    refuse(ErrorCode::kMismatch, fmt::format("brings {} bytes, this rank {}", frame.size, exchange.mine.size()));
  }
  if (frame.num_fds != exchange.fds.size()) {
    refuse(ErrorCode::kMismatch,
           fmt::format("brings {} descriptors, this rank {}", frame.num_fds, exchange.fds.size()));
  }
  const std::size_t expected = std::min<std::size_t>(kMaxPayloadBytes, exchange.mine.size() - peer.received_bytes);
  if (frame.offset != peer.received_bytes || payload.size() != expected) {
    refuse(ErrorCode::kCorrupt, "sent a frame out of order");
  }
  const std::size_t at = static_cast<std::size_t>(peer.rank) * exchange.mine.size() + peer.received_bytes;
  std::ranges::copy(payload, exchange.all.begin() + static_cast<std::ptrdiff_t>(at));
  peer.received_bytes += payload.size();
  peer.received = peer.received_bytes == exchange.mine.size();
}

}  // namespace anyep::control
