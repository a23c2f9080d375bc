// Packets over a connected Unix socket (SOCK_SEQPACKET): whole or not at all, in order, with descriptors if wanted.
#pragma once

#include <sys/types.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "bootstrap/unique_fd.h"

namespace anyep::control {

using bootstrap::UniqueFd;

/// Most payload in one packet: an eighth of the usual send buffer (212992 bytes), so a writable socket takes it.
inline constexpr std::size_t kMaxPayloadBytes = 24 * 1024;
/// Most descriptors in one packet; the kernel's limit is 253.
inline constexpr std::size_t kMaxPacketFds = 64;

enum class Io : std::uint8_t {
  kDone,
  kAgain,  ///< would have to wait
  kClosed  ///< the other end is gone
};

/// Never waits, raises no signal.
Io send_packet(int socket, std::span<const std::byte> head, std::span<const std::byte> body = {},
               std::span<const int> fds = {}) noexcept;

struct Packet {
  Io io = Io::kClosed;
  std::size_t bytes = 0;
  bool whole = true;  ///< neither bytes nor descriptors were cut off
  std::size_t num_fds = 0;
  std::array<UniqueFd, kMaxPacketFds> fds;  ///< the first num_fds
};

/// Never waits. A packet longer than `buffer` comes cut.
Packet receive_packet(int socket, std::span<std::byte> buffer) noexcept;

/// Who is at the other end, as of when it connected or listened; pid 0 where it cannot be seen from this pid namespace.
struct Credentials {
  pid_t pid = 0;
  uid_t uid = static_cast<uid_t>(-1);
};
Credentials credentials_of(int socket) noexcept;

}  // namespace anyep::control
