#include "host/group.h"

#include <anyep/error.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <string_view>
#include <utility>

#include "core/check.h"
#include "core/env.h"
#include "core/fault_point.h"
#include "core/limits.h"
#include "core/log.h"
#include "core/tuning.h"

namespace anyep::host {
namespace {

constexpr const char* kOp = "create";
/// Address space of the zero-copy buffer: one address for the engine's life needs it up front; it costs no memory.
constexpr std::uint64_t kCombineBufferBytes = std::uint64_t{1} << 36;

/// What every rank brings to create(); compared as numbers so that a difference can be named.
struct Terms {
  std::uint64_t version = 0;
  std::int64_t rows_bytes = 0, low_latency_bytes = 0;
  std::int64_t max_experts = 0, masks = 0, exact_combine = 0, page_bytes = 0, on_gpus = 0;
};

struct SharedMemoryNote {
  std::uint64_t token = 0;
};

template <class T>
std::span<const std::byte> bytes_of(const T& value) {
  return std::as_bytes(std::span<const T, 1>(&value, 1));
}

void check_budget(const Budget& budget, Group::Payload payload) {
  const auto check_bytes = [](const char* name, std::int64_t value) {
    if (value < 0 || value > INT64_MAX / 2) {
      core::throw_argument(kOp, name, fmt::to_string(value), fmt::format("0..{}", INT64_MAX / 2));
    }
  };
  check_bytes("budget.rows_bytes", budget.rows_bytes);
  check_bytes("budget.low_latency_bytes", budget.low_latency_bytes);
  if (budget.rows_bytes == 0 && budget.low_latency_bytes == 0) {
    core::throw_argument(kOp, "budget", "0 bytes in both modes", "rows_bytes > 0 or low_latency_bytes > 0",
                         "Give the mode that you use some memory.");
  }
  if (budget.max_experts < 1 || budget.max_experts > core::kMaxExperts) {
    core::throw_argument(kOp, "budget.max_experts", fmt::to_string(budget.max_experts),
                         fmt::format("1..{}", core::kMaxExperts));
  }
  if (payload != Group::Payload::kHost) return;
  const auto need =
      static_cast<std::uint64_t>(budget.rows_bytes) + static_cast<std::uint64_t>(budget.low_latency_bytes);
  const std::uint64_t have = available_memory_bytes();
  if (need > have) core::throw_resource(kOp, "budget against available memory", 0, need, have);
}

void check_topology(const Topology& topology, const Bootstrap& bootstrap) {
  if (topology.num_ranks() != bootstrap.num_ranks() || topology.rank != bootstrap.rank()) {
    core::throw_argument(kOp, "topology", fmt::format("rank {} of {}", topology.rank, topology.num_ranks()),
                         fmt::format("rank {} of {}, as the bootstrap says", bootstrap.rank(), bootstrap.num_ranks()));
  }
  for (int rank = 0; rank < topology.num_ranks(); ++rank) {
    const auto& info = topology.ranks[static_cast<std::size_t>(rank)];
    if (info.host == topology.ranks[0].host) continue;
    core::throw_error(ErrorCode::kUnsupported, kOp,
                      fmt::format("ranks 0 and {} cannot share memory: they run on different hosts or in different "
                                  "namespaces. CPU ranks need one host.",
                                  rank));
  }
}

std::optional<Error> caught(const auto& step) {
  try {
    step();
  } catch (const Error& error) {
    return error;
  } catch (const std::bad_alloc&) {
    return Error(ErrorCode::kResource, "create: out of memory");
  }
  return std::nullopt;
}

}  // namespace

std::unique_ptr<Group> Group::create(const Budget& budget, const Topology& topology, const Tuning& tuning,
                                     Bootstrap& bootstrap, Payload payload, const Share& share) {
  std::unique_ptr<Group> group(new Group);
  group->budget_ = budget;
  group->payload_ = payload;
  group->tuning_ = tuning;
  group->topology_ = topology;
  // A rank that may not go on still meets the others, so that they learn why instead of waiting for it.
  std::optional<Error> mine = caught([&] {
    core::check_tuning(tuning, kOp);
    check_topology(topology, bootstrap);
    check_budget(budget, payload);
  });
  const auto limit =
      mine ? std::chrono::nanoseconds(Tuning{}.startup_timeout) : core::scaled(tuning.startup_timeout, tuning);
  const Deadline deadline = std::chrono::steady_clock::now() + limit;
  group->connect(mine ? &*mine : nullptr, bootstrap, deadline);
  group->compare(deadline);
  group->share_memory(share, deadline);
  group->control_->start(*group);
  return group;
}

void Group::connect(const Error* mine, Bootstrap& bootstrap, Deadline deadline) {
  rank_ = bootstrap.rank();
  const auto ranks = static_cast<std::size_t>(bootstrap.num_ranks());
  core::fault_point("create.connect", rank_, 0);
  try {
    control_ = control::Control::connect(bootstrap, kOp, deadline);
  } catch (const Error& error) {  // of the caller's bootstrap: it does not know what for it was asked
    if (error.op == kOp) throw;
    Error named = core::reworded(error, fmt::format("{}: {}", kOp, error.what()));
    named.op = kOp;
    throw named;
  }
  generation_ = static_cast<std::uint16_t>(control_->generation());
  control_->vote(mine, kOp, deadline);
  Budget in_host_window = budget_;
  if (payload_ == Payload::kElsewhere) in_host_window.rows_bytes = in_host_window.low_latency_bytes = 0;
  layout_ = core::WindowLayout::make(in_host_window, bootstrap.num_ranks());
  memories_.resize(ranks);
  sent_.assign(core::kNumStreams * ranks, protocol::kFirstEpoch);
  taken_.assign(core::kNumStreams * ranks, protocol::kFirstEpoch);
  failure_words_ = Mapping::reserve(
      core::round_up(core::kWordBytes + 2 * core::round_up(4 * ranks, core::kWordBytes), core::kPageBytes));
  closing_.assign(ranks, 0);
  ended_.assign(ranks, 0);
  readmissions_.resize(ranks);
}

void Group::compare(Deadline deadline) {
  Terms mine;
  for (const char* at = version(); *at != '\0'; ++at) {
    mine.version = protocol::digest(mine.version, static_cast<unsigned char>(*at));
  }
  mine.rows_bytes = budget_.rows_bytes;
  mine.low_latency_bytes = budget_.low_latency_bytes;
  mine.max_experts = budget_.max_experts;
  mine.masks = budget_.masks;
  mine.exact_combine = tuning_.exact_combine;
  mine.on_gpus = payload_ == Payload::kElsewhere;
  mine.page_bytes = topology_.ranks[static_cast<std::size_t>(rank_)].page_bytes;
  std::vector<Terms> all(memories_.size());
  control_->all_gather(bytes_of(mine), std::as_writable_bytes(std::span(all)), deadline);
  const auto differs = [&](const char* what, auto field) {
    for (std::size_t rank = 1; rank < all.size(); ++rank) {
      if (all[rank].*field == all[0].*field) continue;
      Error error(
          ErrorCode::kMismatch,
          fmt::format("create: the ranks disagree on {}: rank 0 has {}, rank {} has {}. Pass the same on every rank.",
                      what, all[0].*field, rank, all[rank].*field));
      error.op = kOp;
      error.rank = rank_;
      error.peers = {0, static_cast<int>(rank)};
      throw error;
    }
  };
  differs("the library's version", &Terms::version);
  differs("budget.rows_bytes", &Terms::rows_bytes);
  differs("budget.low_latency_bytes", &Terms::low_latency_bytes);
  differs("budget.max_experts", &Terms::max_experts);
  differs("budget.masks", &Terms::masks);
  differs("tuning.exact_combine", &Terms::exact_combine);
  differs("the page size", &Terms::page_bytes);
  differs("the backend (1 = GPUs, 0 = CPU ranks; ANYEP_BACKEND)", &Terms::on_gpus);
}

void Group::share_memory(const Share& share, Deadline deadline) {
  const auto me = static_cast<std::size_t>(rank_);
  core::fault_point("create.exchange", rank_, 0);
  std::optional<Error> mine = caught([&] { memories_[me] = make_memory(layout_, rank_, generation_); });
  control_->vote(mine ? &*mine : nullptr, kOp, deadline);

  const SharedMemoryNote note{memories_[me]->token};
  std::vector<SharedMemoryNote> notes(memories_.size());
  control_->all_gather(bytes_of(note), std::as_writable_bytes(std::span(notes)), deadline);
  const int fds[] = {memories_[me]->window_fd.get(), memories_[me]->staging_fd.get()};
  const auto received = control_->exchange_fds(fds, deadline);

  core::fault_point("create.map", rank_, 0);
  mine = caught([&] {
    for (std::size_t peer = 0; peer < memories_.size(); ++peer) {
      if (peer == me) continue;
      if (control_->same_process(static_cast<int>(peer))) {
        memories_[peer] = find_memory(notes[peer].token);
        if (memories_[peer] == nullptr) {
          core::throw_error(ErrorCode::kAborted, kOp, fmt::format("rank {} gave up during create", peer));
        }
      } else {
        memories_[peer] = map_memory(layout_, static_cast<int>(peer), generation_, received[peer].at(0).get(),
                                     received[peer].at(1).get());
      }
    }
  });
  if (share) {
    control_->vote(mine ? &*mine : nullptr, kOp, deadline);
    share(*control_, *this, deadline);  // votes itself wherever it needs all ranks
  }
  if (!mine) mine = caught([&] { control_->prepare(*this); });
  core::fault_point("create.barrier", rank_, 0);
  control_->vote(mine ? &*mine : nullptr, kOp, deadline);  // also the barrier: everybody has mapped everybody
  // The mappings stay; nothing needs the descriptors any more.
  memories_[me]->window_fd.reset();
  memories_[me]->staging_fd.reset();
}

Group::~Group() {
  stop();
}

std::uint64_t& Group::word(int holder, std::uint64_t array, int other) const {
  return *reinterpret_cast<std::uint64_t*>(peer(holder, layout_.word(array, other)));
}

protocol::Doorbell& Group::doorbell(int rank) const {
  return *reinterpret_cast<protocol::Doorbell*>(peer(rank, layout_.doorbell));
}

protocol::HandoffEnd Group::producer_end(core::Stream stream, int to) {
  const auto index = static_cast<std::size_t>(stream) * memories_.size() + static_cast<std::size_t>(to);
  return {&word(rank_, layout_.credit[stream], to), &word(to, layout_.arrived[stream], rank_), &sent_[index],
          &doorbell(to)};
}

protocol::HandoffEnd Group::consumer_end(core::Stream stream, int from) {
  const auto index = static_cast<std::size_t>(stream) * memories_.size() + static_cast<std::size_t>(from);
  return {&word(from, layout_.credit[stream], rank_), &word(rank_, layout_.arrived[stream], from), &taken_[index],
          &doorbell(from)};
}

std::byte* Group::combine_buffer(std::uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  if (combine_buffer_->data() == nullptr) *combine_buffer_ = Mapping::reserve(std::max(bytes, kCombineBufferBytes));
  if (bytes > combine_buffer_->bytes()) {
    core::throw_capacity("combine_buffer", "the zero-copy buffer", bytes, combine_buffer_->bytes());
  }
  return combine_buffer_->data();
}

std::shared_ptr<const void> Group::hold_memory() {
  using Held = std::pair<std::shared_ptr<RankMemory>, std::shared_ptr<Mapping>>;
  return std::make_shared<const Held>(own_memory(), combine_buffer_);
}

void Group::stop() noexcept {
  if (std::exchange(stopped_, true)) return;
  if (control_ != nullptr) control_->stop();
}

}  // namespace anyep::host
