#include "cuda/memory/growth.h"

#include <fmt/format.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <string>
#include <system_error>
#include <utility>

#include "bootstrap/packet.h"
#include "core/check.h"
#include "core/layout.h"
#include "core/log.h"

namespace anyep::cuda {
namespace {

constexpr const char* kOp = "growing the window";
/// Few pieces rather than small ones: each costs every rank a mapping, 0.2 to 10 ms (measured).
constexpr std::uint64_t kLeastPieceBytes = std::uint64_t{64} << 20;
constexpr auto kLook = std::chrono::milliseconds(10);
/// How long an answer may find the asker's inbox full: its thread only maps memory in between.
constexpr auto kAnswerLimit = std::chrono::seconds(5);

enum Answer : std::uint8_t { kNone, kMapped, kRefused };

}  // namespace

struct Growth::Packet {
  static constexpr std::uint32_t kMagic = 0x50455941;  // "AYEP"
  enum Kind : std::uint32_t { kAdded = 1, kAnswer };
  std::uint32_t magic = kMagic;
  Kind kind = kAdded;
  std::int32_t from = 0;
  std::uint32_t answer = kNone;
  std::uint64_t offset = 0, bytes = 0;
  std::array<std::byte, 64> handle = {};
};

std::pair<bootstrap::UniqueFd, bootstrap::UniqueFd> make_inbox() {
  int ends[2] = {-1, -1};
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) != 0) {
    core::throw_resource("create", "socketpair", errno);
  }
  return {bootstrap::UniqueFd(ends[0]), bootstrap::UniqueFd(ends[1])};
}

Growth::Growth(int rank, std::vector<std::shared_ptr<Window>> windows, const WindowShape& shape, Links links)
    : rank_(rank),
      process_(::getpid()),
      windows_(std::move(windows)),
      shape_(shape),
      links_(std::move(links)),
      stop_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      next_(shape.bytes),
      said_(windows_.size(), kNone) {
  if (!stop_) core::throw_resource("create", "eventfd", errno);
  const bool alone =
      std::ranges::none_of(links_.outboxes, [](const auto& outbox) { return static_cast<bool>(outbox); });
  if (alone) return;
  try {
    thread_ = std::make_unique<std::thread>([this] { answer(); });
  } catch (const std::system_error& error) {
    core::throw_resource("create", "starting a thread", error.code().value());
  }
}

Growth::~Growth() {
  if (thread_ == nullptr) return;
  if (process_ != ::getpid()) {  // a forked child has no such thread
    (void)thread_.release();
    return;
  }
  const std::uint64_t one = 1;
  (void)!::write(stop_.get(), &one, sizeof(one));
  thread_->join();
}

std::uint64_t Growth::room() const {
  const std::lock_guard lock(mutex_);
  const std::uint64_t end = windows_[static_cast<std::size_t>(rank_)]->reserved();
  return end > next_ ? end - next_ : 0;
}

Piece Growth::grow(std::uint64_t bytes, Deadline deadline, const std::function<bool(int)>& gone) {
  const std::lock_guard one(one_at_a_time_);
  const auto begin = std::chrono::steady_clock::now();
  const std::uint64_t have = room();
  const std::uint64_t wanted = core::round_up(std::max<std::uint64_t>(bytes, 1), shape_.unit);
  if (bytes > have || wanted > have) {
    core::throw_capacity(kOp, "another piece", bytes, have, "Give the engine a larger budget of rows_bytes");
  }
  Packet packet;
  packet.from = rank_;
  packet.bytes = std::min(std::max(wanted, core::round_up(kLeastPieceBytes, shape_.unit)), have);
  {
    const std::lock_guard lock(mutex_);
    packet.offset = asked_ = next_;
    next_ += packet.bytes;  // whatever comes of it: a piece that only some have mapped leaves a hole
    std::ranges::fill(said_, kNone);
  }
  const Ticket ticket = windows_[static_cast<std::size_t>(rank_)]->add(packet.offset, packet.bytes);
  packet.handle = ticket.handle;

  std::vector<int> asked;
  for (int peer = 0; peer < static_cast<int>(windows_.size()); ++peer) {
    if (!links_.outboxes[static_cast<std::size_t>(peer)]) continue;
    while (!send(peer, packet, ticket.fd.get()) && !gone(peer)) {
      if (std::chrono::steady_clock::now() >= deadline) break;
      std::this_thread::sleep_for(kLook / 10);
    }
    asked.push_back(peer);
  }
  std::unique_lock lock(mutex_);
  std::vector<int> missing = asked;
  while (true) {
    std::erase_if(missing, [&](int peer) { return said_[static_cast<std::size_t>(peer)] != kNone || gone(peer); });
    if (missing.empty() || std::chrono::steady_clock::now() >= deadline) break;
    answered_.wait_until(lock, std::min(deadline, std::chrono::steady_clock::now() + kLook));
  }
  const auto refused =
      std::ranges::find_if(asked, [&](int peer) { return said_[static_cast<std::size_t>(peer)] == kRefused; });
  if (refused != asked.end()) {
    Error error(ErrorCode::kResource,
                fmt::format("{}: rank {} could not map {} more bytes of rank {}", kOp, *refused, packet.bytes, rank_));
    error.op = kOp;
    error.peers = {*refused};
    error.need = packet.bytes;
    throw error;
  }
  if (!missing.empty()) {
    const auto elapsed = std::chrono::steady_clock::now() - begin;
    Error error(
        ErrorCode::kTimeout,
        fmt::format("{}: ranks {} have not mapped {} more bytes of rank {} in {} ms", kOp, fmt::join(missing, ", "),
                    packet.bytes, rank_, std::chrono::duration_cast<std::chrono::milliseconds>(elapsed).count()));
    error.op = kOp;
    error.peers = missing;
    error.elapsed_ns = static_cast<std::uint64_t>(std::chrono::nanoseconds(elapsed).count());
    throw error;
  }
  return {packet.offset, packet.bytes};
}

bool Growth::send(int peer, const Packet& packet, int fd) const {
  const auto body = std::as_bytes(std::span(&packet, 1));
  const std::span<const int> fds(&fd, fd >= 0 ? 1u : 0u);
  // A rank that has closed is no failure of sending: `gone` tells about it.
  return control::send_packet(links_.outboxes[static_cast<std::size_t>(peer)].get(), body, {}, fds) !=
         control::Io::kAgain;
}

void Growth::answer() {
  while (true) {
    std::array<pollfd, 2> wanted = {pollfd{links_.inbox.get(), POLLIN, 0}, pollfd{stop_.get(), POLLIN, 0}};
    if (::poll(wanted.data(), wanted.size(), -1) < 0 && errno != EINTR) return;
    if (wanted[1].revents != 0) return;
    if (wanted[0].revents == 0) continue;
    Packet packet;
    control::Packet got = control::receive_packet(links_.inbox.get(), std::as_writable_bytes(std::span(&packet, 1)));
    if (got.io == control::Io::kClosed) return;  // every peer has left
    if (got.io != control::Io::kDone) continue;
    if (!got.whole || got.bytes != sizeof(packet) || packet.magic != Packet::kMagic) continue;
    take(packet, got.num_fds > 0 ? std::move(got.fds[0]) : bootstrap::UniqueFd());
  }
}

/// What a faulty rank may send does no harm: every number is checked before it is used.
void Growth::take(Packet& packet, bootstrap::UniqueFd fd) {
  const auto from = static_cast<std::size_t>(packet.from);
  if (packet.from < 0 || from >= windows_.size() || !links_.outboxes[from]) return;
  if (packet.kind == Packet::kAnswer) {
    const std::lock_guard lock(mutex_);
    if (packet.offset != asked_ || (packet.answer != kMapped && packet.answer != kRefused)) return;
    said_[from] = static_cast<std::uint8_t>(packet.answer);
    answered_.notify_all();
    return;
  }
  if (packet.kind == Packet::kAdded) take_piece(packet, std::move(fd));
}

void Growth::take_piece(const Packet& packet, bootstrap::UniqueFd fd) {
  Packet answer = packet;
  answer.kind = Packet::kAnswer;
  answer.from = rank_;
  answer.answer = kRefused;
  const std::uint64_t end = packet.offset + packet.bytes;
  const bool fits = packet.offset >= shape_.bytes && packet.offset % shape_.unit == 0 && packet.bytes > 0 &&
                    packet.bytes % shape_.unit == 0 && end > packet.offset && end <= shape_.reserved;
  try {
    if (fits) {
      windows_[static_cast<std::size_t>(packet.from)]->import(packet.offset, packet.bytes,
                                                              Ticket{std::move(fd), packet.handle});
      answer.answer = kMapped;
    }
  } catch (const std::exception& error) {
    core::log_warning(fmt::format("{}: rank {} asks for {} bytes: {}", kOp, packet.from, packet.bytes, error.what()));
  }
  const auto limit = std::chrono::steady_clock::now() + kAnswerLimit;
  while (!send(packet.from, answer, -1) && std::chrono::steady_clock::now() < limit) {
    std::this_thread::sleep_for(kLook / 10);
  }
}

}  // namespace anyep::cuda
