#include "bootstrap/watcher.h"

#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <array>
#include <cerrno>

#include "bootstrap/process.h"
#include "core/check.h"

namespace anyep::control {
namespace {

using namespace std::chrono_literals;

// How often the peers' mutex words are looked at: no descriptor tells of them. A tenth of the 100 ms within which a
// death is to be known, at a cost of a hundred wake-ups a second.
constexpr int kLookEveryMs = 10;
// A link closes a moment before the process descriptor tells; 51 ms were the worst seen on overloaded cores.
constexpr auto kDeathFollows = 200ms;
// So that one talkative peer does not hold up the others.
constexpr int kMessagesAtOnce = 64;
// What a dead peer can have left in a link's buffer.
constexpr int kLastMessages = 4096;

// An epoll tag: descriptor of which kind, of which peer.
enum class Source : std::uint32_t { kWake, kLink, kProcess };
std::uint64_t tag(Source source, int peer) {
  return static_cast<std::uint64_t>(source) << 32 | static_cast<std::uint32_t>(peer);
}

void add(int epoll, int fd, std::uint64_t data) {
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = data;
  if (::epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) != 0) core::throw_resource("create", "epoll_ctl", errno);
}

}  // namespace

Watcher::Watcher(const World& world)
    : world_(world),
      peers_(world.links.size()),
      epoll_(::epoll_create1(EPOLL_CLOEXEC)),
      wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (!epoll_ || !wake_) core::throw_resource("create", "epoll_create1 or eventfd", errno);
  add(epoll_.get(), wake_.get(), tag(Source::kWake, 0));
  for (int peer = 0; peer < static_cast<int>(peers_.size()); ++peer) {
    if (!link(peer).socket) continue;
    state(peer).state = State::kLinked;
    add(epoll_.get(), link(peer).socket.get(), tag(Source::kLink, peer));
    if (link(peer).pidfd) add(epoll_.get(), link(peer).pidfd.get(), tag(Source::kProcess, peer));
  }
  start_thread();
  if (started_.get_future().get()) return;
  stop();
  core::throw_error(ErrorCode::kInternal, "create", "this C library keeps the word of a robust mutex elsewhere");
}

void Watcher::start_thread() {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // inherited: the user's signal handlers never run on our thread
  const int failed = pthread_create(
      &thread_, nullptr,
      [](void* self) -> void* {
        static_cast<Watcher*>(self)->run();
        return nullptr;
      },
      this);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (failed != 0) core::throw_resource("create", "starting the watcher thread", failed);
  running_ = true;
}

void Watcher::stop() noexcept {
  if (!running_) return;
  running_ = false;
  go_.release();  // where it was never let go
  const std::uint64_t one = 1;
  while (::write(wake_.get(), &one, sizeof one) < 0 && errno == EINTR) {
  }
  pthread_join(thread_, nullptr);
}

void Watcher::run() noexcept {
  pthread_setname_np(pthread_self(), "anyep-watcher");
  started_.set_value(world_.own.begin());
  go_.acquire();
  while (listens_ && handle_events()) look();
  world_.own.end();
}

// False: stop() was called.
bool Watcher::handle_events() noexcept {
  std::array<epoll_event, 16> events;
  const int count = ::epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), timeout_ms());
  for (int at = 0; at < count; ++at) {
    const std::uint64_t data = events[static_cast<std::size_t>(at)].data.u64;
    const auto source = static_cast<Source>(data >> 32);
    const auto peer = static_cast<int>(data & 0xffffffffU);
    if (source == Source::kWake) return false;
    if (source == Source::kLink) read_messages(peer);
    if (source == Source::kProcess) judge(peer);
  }
  return true;
}

int Watcher::timeout_ms() const noexcept {
  for (std::size_t peer = 0; peer < peers_.size(); ++peer) {
    const State state = peers_[peer].state;
    if (state == State::kHungUp || (state == State::kLinked && world_.lives[peer])) return kLookEveryMs;
  }
  return -1;
}

void Watcher::look() noexcept {
  for (int peer = 0; peer < static_cast<int>(peers_.size()); ++peer) {
    const State now = state(peer).state;
    if (now == State::kHungUp || (now == State::kLinked && life(peer) && life(peer).died())) judge(peer);
  }
}

void Watcher::read_messages(int peer) noexcept {
  for (int count = 0; count < kMessagesAtOnce && state(peer).state == State::kLinked; ++count) {
    switch (read_one(peer)) {
      case Io::kDone:
        break;
      case Io::kAgain:
        return;
      case Io::kClosed:
        hang_up(peer);
        return;
    }
  }
}

// A packet that is no message counts as a closed link: a peer that fails right after set-up says so in the form of
// set-up.
Io Watcher::read_one(int peer) noexcept {
  Message message;
  const Packet packet = receive_packet(link(peer).socket.get(), std::as_writable_bytes(std::span(&message, 1)));
  if (packet.io != Io::kDone) return packet.io;
  if (packet.bytes != sizeof message || !packet.whole) return Io::kClosed;
  message.text[sizeof message.text - 1] = '\0';
  world_.listener.on_message(peer, message);
  return Io::kDone;
}

void Watcher::hang_up(int peer) noexcept {
  if (state(peer).state != State::kLinked) return;
  leave_epoll(peer);
  state(peer) = {State::kHungUp, Clock::now()};
  judge(peer);
}

// The link is closed, or there is a sign of death.
void Watcher::judge(int peer) noexcept {
  if (state(peer).state == State::kGone) return;
  if (const char* const how = death_of(peer); how != nullptr) return report_death(peer, how);
  if (state(peer).state != State::kHungUp) return;
  const bool certain = link(peer).same_process || left(peer);
  if (!certain && Clock::now() - state(peer).hung_up < kDeathFollows) return;
  if (!certain && !link(peer).pidfd) return report_death(peer, "hang-up");
  state(peer).state = State::kGone;
  world_.listener.on_hangup(peer);
}

bool Watcher::left(int peer) const noexcept {
  return life(peer) && life(peer).stage() == LifeStage::kStopped;
}

const char* Watcher::death_of(int peer) const noexcept {
  if (life(peer) && life(peer).died()) return "robust mutex";
  if (left(peer)) return nullptr;  // whatever its process does now
  if (link(peer).pidfd && bootstrap::has_exited(link(peer).pidfd.get())) return "pidfd";
  return nullptr;
}

void Watcher::report_death(int peer, const char* how) noexcept {
  if (state(peer).state == State::kLinked) {
    for (int left = kLastMessages; left > 0 && read_one(peer) == Io::kDone; --left) {
    }
  }
  leave_epoll(peer);
  state(peer).state = State::kGone;
  world_.listener.on_death(peer, how);
}

void Watcher::leave_epoll(int peer) noexcept {
  ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, link(peer).socket.get(), nullptr);
  if (link(peer).pidfd) ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, link(peer).pidfd.get(), nullptr);
}

}  // namespace anyep::control
