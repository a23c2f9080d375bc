#include "bootstrap/frames.h"

#include <fmt/format.h>
#include <sys/random.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string_view>

#include "bootstrap/packet.h"
#include "bootstrap/process.h"
#include "core/check.h"

namespace anyep::control {
namespace {

// A process's sockets close a moment before its process descriptor tells of its end (10 ms and more on busy cores).
constexpr std::chrono::milliseconds kDeathFollows{100};

// The last word may stand behind data that nobody reads any more.
bool find_abort(int socket, AbortFrame* frame) {
  std::vector<std::byte> buffer(sizeof(DataFrame) + kMaxPayloadBytes);
  while (true) {
    const Packet packet = receive_packet(socket, buffer);
    if (packet.io != Io::kDone) return false;
    if (read_frame(std::span(buffer).first(packet.bytes), FrameKind::kAbort, frame)) return true;
  }
}

}  // namespace

Key make_key() {
  Key key;
  for (std::size_t have = 0; have < key.size();) {
    const ssize_t got = ::getrandom(key.data() + have, key.size() - have, 0);
    if (got > 0) {
      have += static_cast<std::size_t>(got);
    } else if (errno != EINTR) {
      core::throw_resource("create", "getrandom", errno);
    }
  }
  return key;
}

AbortFrame abort_frame(const Error& error, int rank) {
  AbortFrame frame;
  frame.origin = rank;
  frame.code = static_cast<std::uint32_t>(error.code);
  frame.num_peers = static_cast<std::uint32_t>(std::min(error.peers.size(), AbortFrame::kMaxPeers));
  std::copy_n(error.peers.begin(), frame.num_peers, frame.peers.begin());
  frame.need = error.need;
  frame.have = error.have;
  std::string_view text = error.what();
  const std::string prefix = error.op + ": ";
  if (text.starts_with(prefix)) text.remove_prefix(prefix.size());
  text.copy(frame.text, sizeof frame.text - 1);
  return frame;
}

void send_abort(std::span<const Link> links, const AbortFrame& frame) noexcept {
  for (const Link& link : links) {
    if (link.socket) send_packet(link.socket.get(), bytes_of(frame));
  }
}

void throw_abort(const Step& step, const AbortFrame& frame, int num_ranks) {
  const bool sane = frame.code <= static_cast<std::uint32_t>(ErrorCode::kInternal) && frame.origin >= 0 &&
                    frame.origin < num_ranks && frame.num_peers <= AbortFrame::kMaxPeers;
  if (!sane) bootstrap::throw_about(step, ErrorCode::kCorrupt, {}, "a peer's last word makes no sense");
  std::vector<int> peers;
  for (std::uint32_t at = 0; at < frame.num_peers; ++at) {
    if (frame.peers[at] >= 0 && frame.peers[at] < num_ranks) peers.push_back(frame.peers[at]);
  }
  if (peers.empty()) peers.push_back(frame.origin);
  const std::string_view text(frame.text, ::strnlen(frame.text, sizeof frame.text));
  try {
    bootstrap::throw_about(step, static_cast<ErrorCode>(frame.code), std::move(peers),
                           fmt::format("rank {} reports: {}", frame.origin, text));
  } catch (Error& error) {
    error.need = frame.need;
    error.have = frame.have;
    throw;
  }
}

void throw_lost(const Step& step, int peer, std::span<const Link> links) {
  const Link& link = links[static_cast<std::size_t>(peer)];
  AbortFrame last_word;
  if (link.socket && find_abort(link.socket.get(), &last_word)) {
    send_abort(links, last_word);
    throw_abort(step, last_word, static_cast<int>(links.size()));
  }
  if (link.same_process || (link.pidfd && !bootstrap::has_exited(link.pidfd.get(), kDeathFollows))) {
    bootstrap::throw_about(step, ErrorCode::kAborted, {peer},
                           fmt::format("rank {} gave up and closed its links", peer));
  }
  bootstrap::throw_about(step, ErrorCode::kPeerDead, {peer},
                         link.pidfd ? fmt::format("rank {} died", peer) : fmt::format("rank {} hung up", peer));
}

}  // namespace anyep::control
