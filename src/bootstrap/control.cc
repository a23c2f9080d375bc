#include "bootstrap/control.h"

#include <fmt/format.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <mutex>
#include <string>
#include <utility>

#include "bootstrap/door.h"
#include "bootstrap/frames.h"
#include "bootstrap/life.h"
#include "bootstrap/packet.h"
#include "bootstrap/rendezvous.h"
#include "bootstrap/setup.h"
#include "bootstrap/watcher.h"
#include "core/check.h"
#include "core/topology.h"

namespace anyep::control {
namespace {

// What a rank brings to a vote.
struct Ballot {
  std::uint32_t failed = 0;
  std::uint32_t code = 0;
  std::uint64_t need = 0, have = 0;
  char text[1000] = {};

  std::string_view words() const { return {text, ::strnlen(text, sizeof text)}; }
};

Ballot fill_in(const Error* mine, std::string_view op) {
  Ballot ballot;
  if (mine == nullptr) return ballot;
  ballot.failed = 1;
  ballot.code = static_cast<std::uint32_t>(mine->code);
  ballot.need = mine->need;
  ballot.have = mine->have;
  std::string_view text = mine->what();
  const std::string prefix = fmt::format("{}: ", op);
  if (text.starts_with(prefix)) text.remove_prefix(prefix.size());
  text.copy(ballot.text, sizeof ballot.text - 1);
  return ballot;
}

// One error for all who voted: the same text everywhere, the own fields where there are some.
void count_votes(const Step& step, std::span<const Ballot> ballots, const Error* mine) {
  std::vector<int> failed;
  std::string causes;
  for (std::size_t rank = 0; rank < ballots.size(); ++rank) {
    if (ballots[rank].failed == 0) continue;
    causes += fmt::format("{}rank {}: {}", failed.empty() ? "" : "; ", rank, ballots[rank].words());
    failed.push_back(static_cast<int>(rank));
  }
  if (failed.empty()) return;
  const Ballot& lowest = ballots[static_cast<std::size_t>(failed.front())];
  const auto code = static_cast<ErrorCode>(std::min(lowest.code, static_cast<std::uint32_t>(ErrorCode::kInternal)));
  Error error(mine != nullptr ? mine->code : code,
              fmt::format("{}: failed on {} of {} ranks: {}", step.op, failed.size(), ballots.size(), causes));
  if (mine != nullptr) {
    error.peers = mine->peers;
    error.phase = mine->phase;
    error.sequence = mine->sequence;
    error.expected = mine->expected;
    error.seen = mine->seen;
    error.elapsed_ns = mine->elapsed_ns;
    error.limit_ns = mine->limit_ns;
    error.argument = mine->argument;
    error.got = mine->got;
    error.allowed = mine->allowed;
  }
  if (error.peers.empty()) error.peers = failed;
  error.op = step.op;
  error.rank = step.rank;
  error.need = mine != nullptr ? mine->need : lowest.need;
  error.have = mine != nullptr ? mine->have : lowest.have;
  throw error;
}

// A rank that was killed could not take its door away.
void sweep_after(const Error& error) noexcept {
  if (error.code == ErrorCode::kPeerDead) Door::sweep();
}

}  // namespace

struct Control::State {
  explicit State(int own_rank, Mesh&& mesh)
      : rank(own_rank),
        generation(mesh.generation),
        num_strangers(mesh.num_strangers),
        links(std::move(mesh.links)),
        set_up(rank, links) {}

  Step step(std::string_view name, std::string_view phase, Deadline deadline) const {
    return {.op = name, .phase = phase, .rank = rank, .deadline = deadline};
  }
  bool in_owner() const noexcept { return owner == ::getpid(); }
  int num_ranks() const noexcept { return static_cast<int>(links.size()); }
  void release() noexcept {
    watcher.reset();
    own_life.reset();
    lives.clear();
    for (Link& link : links) {
      link.socket.reset();
      link.pidfd.reset();
    }
  }

  std::string op;
  const pid_t owner = ::getpid();
  const int rank;
  const std::uint64_t generation, num_strangers;
  std::vector<Link> links;
  SetUp set_up;
  std::unique_ptr<OwnLife> own_life;
  std::vector<PeerLife> lives;
  std::unique_ptr<Watcher> watcher;
  std::mutex open;  ///< held while tell() uses a link, and while links are closed
};

std::unique_ptr<Control> Control::connect(Bootstrap& bootstrap, std::string_view op, Deadline deadline) {
  const int rank = bootstrap.rank();
  core::check_rank(op, rank, bootstrap.num_ranks());
  const Step step{.op = op, .phase = "connect", .rank = rank, .deadline = deadline};
  Mesh mesh;
  if (bootstrap.num_ranks() > 1) {
    try {
      mesh = meet(bootstrap, step);
    } catch (const Error& error) {
      sweep_after(error);
      throw;
    }
  } else {
    mesh.links.resize(1);
    mesh.links[0].pid = ::getpid();
    mesh.links[0].same_process = true;
    Key key = make_key();
    mesh.generation = std::max<std::uint64_t>(
        1, std::to_integer<std::uint64_t>(key[0]) << 8 | std::to_integer<std::uint64_t>(key[1]));
  }
  auto state = std::make_unique<State>(rank, std::move(mesh));
  state->op = op;
  try {
    state->own_life = std::make_unique<OwnLife>();
    const std::array<int, 1> mine = {state->own_life->fd()};
    const auto pages = state->set_up.exchange_fds(step, mine);
    state->lives.resize(state->links.size());
    for (std::size_t peer = 0; peer < pages.size(); ++peer) {
      if (!state->links[peer].same_process) state->lives[peer] = PeerLife(pages[peer].at(0).get());
    }
  } catch (const Error& error) {
    send_abort(state->links, abort_frame(error, rank));
    sweep_after(error);
    throw;
  }
  return std::unique_ptr<Control>(new Control(std::move(state)));
}

Control::Control(std::unique_ptr<State> state) noexcept : state_(std::move(state)) {}

Control::~Control() {
  stop();
}

int Control::rank() const noexcept {
  return state_->rank;
}

int Control::num_ranks() const noexcept {
  return state_->num_ranks();
}

std::uint64_t Control::generation() const noexcept {
  return state_->generation;
}

bool Control::same_process(int peer) const noexcept {
  return state_->links[static_cast<std::size_t>(peer)].same_process;
}

std::int64_t Control::pid(int peer) const noexcept {
  return state_->links[static_cast<std::size_t>(peer)].pid;
}

std::uint64_t Control::num_strangers() const noexcept {
  return state_->num_strangers;
}

void Control::all_gather(std::span<const std::byte> mine, std::span<std::byte> all, Deadline deadline) {
  state_->set_up.all_gather(state_->step(state_->op, "exchange", deadline), mine, all);
}

std::vector<std::vector<UniqueFd>> Control::exchange_fds(std::span<const int> mine, Deadline deadline) {
  return state_->set_up.exchange_fds(state_->step(state_->op, "exchange", deadline), mine);
}

void Control::vote(const Error* mine, std::string_view op, Deadline deadline) {
  const Step step = state_->step(op, "exchange", deadline);
  const Ballot ballot = fill_in(mine, op);
  std::vector<Ballot> ballots(static_cast<std::size_t>(num_ranks()));
  state_->set_up.all_gather(step, bytes_of(ballot), std::as_writable_bytes(std::span(ballots)));
  count_votes(step, ballots, mine);
}

void Control::prepare(Listener& listener) {
  ANYEP_CHECK(state_->watcher == nullptr && state_->own_life != nullptr, "a control is started once");
  if (num_ranks() == 1) return;
  state_->watcher = std::make_unique<Watcher>(
      Watcher::World{state_->rank, state_->links, state_->lives, *state_->own_life, listener});
}

void Control::start(Listener& listener) {
  if (state_->watcher == nullptr) prepare(listener);
  if (state_->watcher != nullptr) state_->watcher->go();
}

bool Control::tell(int peer, const Message& message) noexcept {
  if (peer < 0 || peer >= num_ranks() || peer == rank() || !state_->in_owner()) return false;
  const std::lock_guard lock(state_->open);
  const Link& link = state_->links[static_cast<std::size_t>(peer)];
  return link.socket && send_packet(link.socket.get(), std::as_bytes(std::span(&message, 1))) == Io::kDone;
}

void Control::tell_all(const Message& message) noexcept {
  for (int peer = 0; peer < num_ranks(); ++peer) tell(peer, message);
}

void Control::stop() noexcept {
  if (!state_->in_owner()) {  // a forked child: no such thread here, and a lock may be held for good
    if (state_->watcher != nullptr) state_->watcher->forget();
    if (state_->own_life != nullptr) state_->own_life->forget();
    state_->release();
    return;
  }
  if (state_->watcher != nullptr) state_->watcher->stop();
  const std::lock_guard lock(state_->open);
  for (const Link& link : state_->links) {
    if (link.socket) ::shutdown(link.socket.get(), SHUT_RDWR);  // reaches the peer even if a child holds a copy
  }
  state_->release();
}

}  // namespace anyep::control
