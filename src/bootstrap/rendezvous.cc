#include "bootstrap/rendezvous.h"

#include <fmt/format.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
#include <string>
#include <utility>

#include "bootstrap/card.h"
#include "bootstrap/door.h"
#include "bootstrap/packet.h"
#include "bootstrap/process.h"
#include "core/check.h"
#include "core/log.h"

namespace anyep::control {
namespace {

using Clock = std::chrono::steady_clock;
using namespace std::chrono_literals;

// A rank sends its hello right after connecting; whoever has not done so by then is no rank.
constexpr auto kHelloLimit = 5s;
// How soon to knock again where the queue at a door is full.
constexpr auto kKnockAfter = 10ms;
// How long after a closed door the reason may come from elsewhere.
constexpr auto kReasonFollows = 50ms;
// How often to look for the death of ranks that have not come: a few system calls for each.
constexpr auto kLookAfter = 100ms;
constexpr std::size_t kMaxStrangers = 64;  // at once; more wait in the door's queue

// A connection whose end is not a rank yet.
struct Caller {
  Link link;
  Key challenge{};
  int rank = -1;            ///< known from its hello on
  Clock::time_point until;  ///< for the hello
};

class Rendezvous {
 public:
  explicit Rendezvous(const Step& step) : step_(step), rank_(step.rank) {}
  Mesh run(Bootstrap& bootstrap);

 private:
  int num_ranks() const { return static_cast<int>(cards_.size()); }
  Link& link(int peer) { return mesh_.links[static_cast<std::size_t>(peer)]; }
  const Card& card(int peer) const { return cards_[static_cast<std::size_t>(peer)]; }
  bool linked(int peer) const { return linked_[static_cast<std::size_t>(peer)]; }
  void set_linked(int peer) { linked_[static_cast<std::size_t>(peer)] = true; }

  void tell_all(const AbortFrame& frame) noexcept;
  void exchange_cards(Bootstrap& bootstrap);
  void connect_all();
  void call_doors();
  bool call_door(int peer);
  void leave(int peer);
  void check_gone();
  void answer_callers();
  void wait_for_news();
  void handle_link(int peer);
  void handle_caller(Caller& caller);
  void welcome(Caller& caller, const Greeting& hello);
  bool is_hello(const Greeting& hello) const;
  void drop_callers();
  bootstrap::Life look_up_by_card(int peer, UniqueFd& pidfd) const;
  void look_for_deaths();
  std::vector<int> missing() const;
  Greeting greeting(FrameKind kind, int to) const;

  Step step_;
  int rank_;
  Door door_;
  std::vector<Card> cards_;
  Mesh mesh_;
  std::vector<char> linked_;     // by peer: greetings are complete
  std::vector<Key> challenges_;  // by peer below: sent with the hello
  std::vector<Caller> callers_;
  Clock::time_point look_at_;
  int gone_ = -1;  // the first rank whose door was found closed
  Clock::time_point gone_since_;
};

// What we find at the other end of a new socket.
Link introduce(UniqueFd socket) {
  Link link;
  const Credentials peer = credentials_of(socket.get());
  link.socket = std::move(socket);
  link.pid = peer.pid;
  link.same_process = peer.pid == ::getpid();
  if (peer.pid == 0 || link.same_process) return link;
  link.pidfd = bootstrap::open_process(peer.pid);
  if (!link.pidfd && (errno == EMFILE || errno == ENFILE)) core::throw_resource("create", "pidfd_open", errno);
  return link;
}

Mesh Rendezvous::run(Bootstrap& bootstrap) {
  exchange_cards(bootstrap);
  mesh_.links.resize(cards_.size());
  linked_.resize(cards_.size());
  challenges_.resize(cards_.size());
  std::memcpy(&mesh_.generation, cards_[0].job.data(), sizeof mesh_.generation);
  mesh_.generation = std::max<std::uint64_t>(1, mesh_.generation & 0xffff);
  link(rank_).pid = ::getpid();
  link(rank_).same_process = true;
  set_linked(rank_);
  try {
    connect_all();
  } catch (const Error& error) {
    tell_all(abort_frame(error, rank_));
    throw;
  }
  return std::move(mesh_);
}

// Everybody that can be reached, or they would wait for us to their limit: links, those at our door, and the doors that we
// have not called yet.
void Rendezvous::tell_all(const AbortFrame& frame) noexcept {
  send_abort(mesh_.links, frame);
  for (const Caller& caller : callers_) send_abort(std::span(&caller.link, 1), frame);
  while (door_.socket() >= 0) {
    const UniqueFd waiting = door_.answer();
    if (!waiting) break;
    send_packet(waiting.get(), bytes_of(frame));
  }
  door_.close();  // leaves a descriptor to call with, should they have run out
  for (int peer = 0; peer < rank_; ++peer) {
    if (link(peer).socket) continue;
    const UniqueFd socket = Door::call(card(peer).words());
    if (!socket) continue;
    Greeting hello = greeting(FrameKind::kHello, peer);
    hello.door = card(peer).door;
    send_packet(socket.get(), bytes_of(hello));
    send_packet(socket.get(), bytes_of(frame));
  }
}

void Rendezvous::exchange_cards(Bootstrap& bootstrap) {
  Card mine;
  mine.rank = rank_;
  mine.num_ranks = bootstrap.num_ranks();
  const bootstrap::ProcessId self = bootstrap::ProcessId::of_this_process();
  mine.pid = self.pid;
  mine.start_ticks = self.start_ticks;
  mine.pid_namespace = bootstrap::pid_namespace();
  std::string text;
  try {
    mine.job = make_key();
    mine.door = make_key();
    door_.open(mine.num_ranks);
    text = door_.path();
  } catch (const std::exception& error) {
    mine.failed = 1;  // the others must hear of it, or they would wait
    text = error.what();
  }
  text.copy(mine.text, sizeof mine.text - 1);
  cards_.resize(static_cast<std::size_t>(mine.num_ranks));
  bootstrap.all_gather(bytes_of(mine), std::as_writable_bytes(std::span(cards_)), step_.deadline);
  check_cards(step_, cards_);
}

void Rendezvous::connect_all() {
  look_at_ = Clock::now() + kLookAfter;
  while (!missing().empty()) {
    call_doors();
    answer_callers();
    wait_for_news();
    drop_callers();
    check_gone();
    if (Clock::now() >= look_at_) look_for_deaths();
    if (Clock::now() >= step_.deadline && !missing().empty()) {
      bootstrap::throw_missing(step_, missing(), "connect");
    }
    if (door_.socket() >= 0 &&
        std::all_of(linked_.begin() + rank_ + 1, linked_.end(), [](char is) { return is != 0; })) {
      door_.close();
    }
  }
  if (mesh_.num_strangers > 0)
    core::log_warning(fmt::format("{}: dropped {} connections of strangers", step_.op, mesh_.num_strangers));
}

std::vector<int> Rendezvous::missing() const {
  std::vector<int> ranks;
  for (int peer = 0; peer < num_ranks(); ++peer) {
    if (!linked(peer)) ranks.push_back(peer);
  }
  return ranks;
}

Greeting Rendezvous::greeting(FrameKind kind, int to) const {
  Greeting frame;
  frame.start.kind = kind;
  frame.rank = rank_;
  frame.to = to;
  frame.job = card(0).job;
  return frame;
}

void Rendezvous::call_doors() {
  for (int peer = 0; peer < rank_; ++peer) {
    if (!link(peer).socket && !call_door(peer)) return;  // its queue is full: later
  }
}

bool Rendezvous::call_door(int peer) {
  UniqueFd socket = Door::call(card(peer).words());
  if (!socket) {
    if (errno == EAGAIN) return false;
    if (errno == ENOENT || errno == ECONNREFUSED) {
      leave(peer);
      return true;
    }
    core::throw_resource(step_.op, fmt::format("connecting to rank {} at {}", peer, card(peer).words()), errno);
  }
  Greeting hello = greeting(FrameKind::kHello, peer);
  hello.door = card(peer).door;
  // What may fail comes before the link: over a link without a hello, the news of a failure would be a stranger's.
  hello.challenge = challenges_[static_cast<std::size_t>(peer)] = make_key();
  link(peer) = introduce(std::move(socket));
  if (send_packet(link(peer).socket.get(), bytes_of(hello)) != Io::kDone) leave(peer);
  return true;
}

// A rank below this one has closed its door. That may be due to a third, whose last word is on its way to us too.
void Rendezvous::leave(int peer) {
  link(peer).socket.reset();
  if (gone_ < 0) gone_since_ = Clock::now();
  if (gone_ < 0) gone_ = peer;
}

void Rendezvous::check_gone() {
  if (gone_ < 0 || Clock::now() - gone_since_ < kReasonFollows) return;
  look_for_deaths();  // it may have gone because of one
  look_up_by_card(gone_, link(gone_).pidfd);
  throw_lost(step_, gone_, mesh_.links);
}

void Rendezvous::answer_callers() {
  while (door_.socket() >= 0 && callers_.size() < kMaxStrangers + cards_.size()) {
    UniqueFd socket = door_.answer();
    if (!socket) {
      if (errno == EAGAIN) return;
      core::throw_resource(step_.op, "accept", errno);
    }
    if (credentials_of(socket.get()).uid != ::geteuid()) {
      ++mesh_.num_strangers;
      continue;
    }
    callers_.push_back({introduce(std::move(socket)), {}, -1, Clock::now() + kHelloLimit});
  }
}

// Sleeps until something can be done, then does it.
void Rendezvous::wait_for_news() {
  std::vector<pollfd> entries;
  if (door_.socket() >= 0) entries.push_back({door_.socket(), POLLIN, 0});
  const std::size_t first_caller = entries.size();
  for (const Caller& caller : callers_) entries.push_back({caller.link.socket.get(), POLLIN, 0});
  const std::size_t first_link = entries.size();
  // Of linked peers only a hang-up is news: they may be ahead of us, and their data must stay.
  for (int peer = 0; peer < num_ranks(); ++peer) {
    entries.push_back({link(peer).socket.get(), static_cast<short>(linked(peer) ? 0 : POLLIN), 0});
  }
  const auto sleep = std::min<Clock::duration>(kKnockAfter, step_.deadline - Clock::now());
  const auto milliseconds = std::chrono::ceil<std::chrono::milliseconds>(sleep).count();
  if (::poll(entries.data(), entries.size(), static_cast<int>(std::max<std::int64_t>(0, milliseconds))) <= 0) return;
  for (std::size_t at = 0; at < callers_.size(); ++at) {
    if (entries[first_caller + at].revents != 0) handle_caller(callers_[at]);
  }
  for (int peer = 0; peer < num_ranks(); ++peer) {
    if (entries[first_link + static_cast<std::size_t>(peer)].revents != 0) handle_link(peer);
  }
}

// Rank `peer` is below this one and answers the hello; or it is linked and has hung up.
void Rendezvous::handle_link(int peer) {
  if (linked(peer)) throw_lost(step_, peer, mesh_.links);
  std::array<std::byte, sizeof(AbortFrame)> buffer;
  const Packet packet = receive_packet(link(peer).socket.get(), buffer);
  if (packet.io == Io::kAgain) return;
  const auto bytes = std::span(buffer).first(packet.bytes);
  AbortFrame last_word;
  if (read_frame(bytes, FrameKind::kAbort, &last_word)) {
    send_abort(mesh_.links, last_word);
    throw_abort(step_, last_word, num_ranks());
  }
  if (packet.io == Io::kClosed) return leave(peer);
  Greeting answer;
  const bool good = read_frame(bytes, FrameKind::kWelcome, &answer) && packet.bytes == sizeof answer &&
                    answer.rank == peer && answer.to == rank_ && answer.job == card(0).job &&
                    answer.answer == challenges_[static_cast<std::size_t>(peer)];
  if (!good)
    bootstrap::throw_about(step_, ErrorCode::kCorrupt, {peer}, fmt::format("rank {} answers with no welcome", peer));
  Greeting confirm = greeting(FrameKind::kConfirm, peer);
  confirm.answer = answer.challenge;
  if (send_packet(link(peer).socket.get(), bytes_of(confirm)) != Io::kDone) throw_lost(step_, peer, mesh_.links);
  set_linked(peer);
}

bool Rendezvous::is_hello(const Greeting& hello) const {
  if (hello.job != card(0).job || hello.door != card(rank_).door || hello.to != rank_) return false;
  if (hello.rank <= rank_ || hello.rank >= num_ranks() || linked(hello.rank)) return false;
  return std::ranges::none_of(callers_, [&](const Caller& other) { return other.rank == hello.rank; });
}

void Rendezvous::handle_caller(Caller& caller) {
  std::array<std::byte, sizeof(AbortFrame)> buffer;
  const Packet packet = receive_packet(caller.link.socket.get(), buffer);
  if (packet.io == Io::kAgain) return;
  const auto bytes = std::span(buffer).first(packet.bytes);
  Greeting frame;
  if (caller.rank < 0) {
    const bool known = packet.io == Io::kDone && packet.bytes == sizeof frame &&
                       read_frame(bytes, FrameKind::kHello, &frame) && is_hello(frame);
    if (known) {
      welcome(caller, frame);
    } else {
      caller.link.socket.reset();  // a stranger
    }
    return;
  }
  const int peer = caller.rank;
  AbortFrame last_word;
  if (read_frame(bytes, FrameKind::kAbort, &last_word)) {
    send_abort(mesh_.links, last_word);
    throw_abort(step_, last_word, num_ranks());
  }
  link(peer) = std::move(caller.link);
  if (packet.io == Io::kClosed) throw_lost(step_, peer, mesh_.links);
  const bool good = read_frame(bytes, FrameKind::kConfirm, &frame) && packet.bytes == sizeof frame &&
                    frame.rank == peer && frame.to == rank_ && frame.answer == caller.challenge;
  if (!good) bootstrap::throw_about(step_, ErrorCode::kCorrupt, {peer}, fmt::format("rank {} confirms nothing", peer));
  set_linked(peer);
}

// A rank that has left again since its hello is no stranger: its link tells what it said last.
void Rendezvous::welcome(Caller& caller, const Greeting& hello) {
  caller.rank = hello.rank;
  caller.challenge = make_key();
  Greeting frame = greeting(FrameKind::kWelcome, hello.rank);
  frame.challenge = caller.challenge;
  frame.answer = hello.challenge;
  send_packet(caller.link.socket.get(), bytes_of(frame));
}

// Those who have become links, strangers, and those who said nothing in time.
void Rendezvous::drop_callers() {
  const auto now = Clock::now();
  std::erase_if(callers_, [&](const Caller& caller) {
    if (caller.rank >= 0) return linked(caller.rank);
    const bool stranger = !caller.link.socket || now >= caller.until;
    if (stranger) ++mesh_.num_strangers;
    return stranger;
  });
}

// A rank that has not come yet is known by its card only.
bootstrap::Life Rendezvous::look_up_by_card(int peer, UniqueFd& pidfd) const {
  const Card& other = card(peer);
  const bool visible = other.pid_namespace != 0 && other.pid_namespace == card(rank_).pid_namespace;
  return visible ? bootstrap::look_up({static_cast<pid_t>(other.pid), other.start_ticks}, pidfd)
                 : bootstrap::Life::kUnknown;
}

void Rendezvous::look_for_deaths() {
  look_at_ = Clock::now() + kLookAfter;
  std::vector<int> dead;
  for (const int peer : missing()) {
    UniqueFd pidfd;
    if (look_up_by_card(peer, pidfd) == bootstrap::Life::kDead) dead.push_back(peer);
  }
  if (dead.empty()) return;
  const std::string text = fmt::format("{} died", bootstrap::name_ranks(dead));
  bootstrap::throw_about(step_, ErrorCode::kPeerDead, std::move(dead), text);
}

}  // namespace

Mesh meet(Bootstrap& bootstrap, const Step& step) {
  return Rendezvous(step).run(bootstrap);
}

}  // namespace anyep::control
