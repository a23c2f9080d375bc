// What goes over a link before its watcher starts: greetings of the rendezvous, data of set-up exchanges, and the word
// of a rank that gives up. Fixed-size structs; whoever reads one checks `start` first.
#pragma once

#include <anyep/error.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>
#include <vector>

#include "bootstrap/peer_error.h"
#include "bootstrap/unique_fd.h"

namespace anyep::control {

using bootstrap::Step;
using bootstrap::UniqueFd;

/// A socket to one peer. Own entry and peers not connected: no socket.
struct Link {
  UniqueFd socket;
  UniqueFd pidfd;  ///< of the peer's process; none in this process and where it cannot be seen
  std::int64_t pid = 0;
  bool same_process = false;
};

/// 128 random bits.
using Key = std::array<std::byte, 16>;
/// @throws Error kResource
Key make_key();

enum class FrameKind : std::uint32_t { kHello = 1, kWelcome, kConfirm, kData, kAbort };

struct FrameStart {
  static constexpr std::uint64_t kMagic = 0x314b4e4c45594e41;  // "ANYELNK1"
  static constexpr std::uint32_t kVersion = 1;
  std::uint64_t magic = kMagic;
  std::uint32_t version = kVersion;
  FrameKind kind = FrameKind::kHello;
};

/// Hello, then Welcome, then Confirm: each side's challenge is answered after it has opened the other's process
/// descriptor, so that descriptor is of the process that holds the other end.
struct Greeting {
  FrameStart start;
  std::int32_t rank = -1, to = -1;  ///< sender, receiver
  Key job{};                        ///< same on all ranks: drawn by rank 0
  Key door{};                       ///< drawn by the rank that listens: only its peers know it
  Key challenge{}, answer{};
};

/// Before the payload of a set-up exchange.
struct DataFrame {
  FrameStart start{.kind = FrameKind::kData};
  std::uint32_t operation = 0;  ///< number of the set-up exchange
  std::uint32_t num_fds = 0;    ///< in this packet
  std::uint64_t size = 0, offset = 0;
};

/// The last word of a rank that fails during set-up; passed on unchanged by those who fail because of it.
struct AbortFrame {
  static constexpr std::size_t kMaxPeers = 64;
  FrameStart start{.kind = FrameKind::kAbort};
  std::int32_t origin = -1;
  std::uint32_t code = 0;
  std::uint32_t num_peers = 0;
  std::uint32_t reserved = 0;
  std::array<std::int32_t, kMaxPeers> peers{};
  std::uint64_t need = 0, have = 0;
  char text[1024] = {};
};

template <class T>
std::span<const std::byte> bytes_of(const T& value) {
  static_assert(std::has_unique_object_representations_v<T>, "padding would leak memory");
  return std::as_bytes(std::span(&value, 1));
}

/// The bytes as a frame of this kind, if they are one.
template <class T>
bool read_frame(std::span<const std::byte> bytes, FrameKind kind, T* frame);

/// The error as a frame; its text without the name of the operation, which the reader puts before it.
AbortFrame abort_frame(const Error& error, int rank);
/// As far as links are open and take it.
void send_abort(std::span<const Link> links, const AbortFrame& frame) noexcept;
/// The peer's error, as this rank's.
[[noreturn]] void throw_abort(const Step& step, const AbortFrame& frame, int num_ranks);
/// `peer` hung up. Throws its last word if it left one (after passing it on), else kPeerDead, or kAborted where its
/// process lives.
[[noreturn]] void throw_lost(const Step& step, int peer, std::span<const Link> links);

template <class T>
bool read_frame(std::span<const std::byte> bytes, FrameKind kind, T* frame) {
  if (bytes.size() < sizeof(T)) return false;
  std::copy_n(bytes.begin(), sizeof(T), std::as_writable_bytes(std::span(frame, 1)).begin());
  return frame->start.magic == FrameStart::kMagic && frame->start.version == FrameStart::kVersion &&
         frame->start.kind == kind;
}

}  // namespace anyep::control
