#include "bootstrap/packet.h"

#include <sys/socket.h>
#include <sys/uio.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

namespace anyep::control {
namespace {

constexpr std::size_t kControlBytes = CMSG_SPACE(sizeof(int) * kMaxPacketFds);

Io of_error(int error) noexcept {
  switch (error) {
    case EAGAIN:
    case ENOBUFS:
    case ENOMEM:
    case ETOOMANYREFS:  // descriptors on their way: room when the receivers have taken some
      return Io::kAgain;
    default:
      return Io::kClosed;
  }
}

void put_fds(msghdr& message, std::span<std::byte> control, std::span<const int> fds) noexcept {
  message.msg_control = control.data();
  message.msg_controllen = CMSG_SPACE(fds.size_bytes());
  cmsghdr* const header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(fds.size_bytes());
  std::memcpy(CMSG_DATA(header), fds.data(), fds.size_bytes());
}

void take_fds(msghdr& message, Packet& packet) noexcept {
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr; header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t at = 0; at < count; ++at) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(header) + at * sizeof(int), sizeof fd);
      UniqueFd owner(fd);
      if (packet.num_fds < kMaxPacketFds) packet.fds[packet.num_fds++] = std::move(owner);
    }
  }
}

}  // namespace

Io send_packet(int socket, std::span<const std::byte> head, std::span<const std::byte> body,
               std::span<const int> fds) noexcept {
  std::array<iovec, 2> parts = {iovec{const_cast<std::byte*>(head.data()), head.size()},
                                iovec{const_cast<std::byte*>(body.data()), body.size()}};
  alignas(cmsghdr) std::array<std::byte, kControlBytes> control{};
  msghdr message{};
  message.msg_iov = parts.data();
  message.msg_iovlen = body.empty() ? 1 : 2;
  if (!fds.empty()) put_fds(message, control, fds);
  while (::sendmsg(socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL) < 0) {
    if (errno != EINTR) return of_error(errno);
  }
  return Io::kDone;
}

Packet receive_packet(int socket, std::span<std::byte> buffer) noexcept {
  Packet packet;
  iovec part{buffer.data(), buffer.size()};
  alignas(cmsghdr) std::array<std::byte, kControlBytes> control{};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  ssize_t bytes = 0;
  // A peer that closes with unread packets leaves ECONNRESET once, before what it had sent.
  for (bool reset = false; (bytes = ::recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC)) < 0;) {
    if (errno == EINTR) continue;
    if (errno == ECONNRESET && !reset) {
      reset = true;
      continue;
    }
    packet.io = of_error(errno);
    return packet;
  }
  take_fds(message, packet);
  packet.io = bytes > 0 ? Io::kDone : Io::kClosed;  // nobody sends empty packets
  packet.bytes = static_cast<std::size_t>(bytes);
  packet.whole = (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) == 0;
  return packet;
}

Credentials credentials_of(int socket) noexcept {
  ucred peer{};
  socklen_t size = sizeof peer;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) return {};
  return {peer.pid, peer.uid};
}

}  // namespace anyep::control
