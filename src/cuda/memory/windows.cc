#include "cuda/memory/windows.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <span>
#include <utility>

#include "core/check.h"
#include "core/log.h"
#include "cuda/memory/sharing.h"
#include "cuda/runtime/device_guard.h"

namespace anyep::cuda {
namespace {

constexpr const char* kOp = "create";

template <class Body>
std::optional<Error> caught(Body&& body) {
  try {
    body();
  } catch (const Error& error) {
    return error;
  } catch (const std::bad_alloc&) {
    return Error(ErrorCode::kResource, "create: out of host memory");
  }
  return std::nullopt;
}

template <class T>
std::span<const std::byte> bytes_of(const T& value) {
  return std::as_bytes(std::span(&value, 1));
}

/// What a rank says after each step of trying a way of sharing.
struct StepNote {
  enum Outcome : std::uint64_t { kDone, kNotThisWay, kFailed };
  Outcome outcome = kDone;
  std::array<std::byte, 64> handle = {};  ///< Ticket::handle of its window
};

StepNote::Outcome outcome_of(const std::optional<Error>& error) {
  if (!error) return StepNote::kDone;
  return error->code == ErrorCode::kUnsupported ? StepNote::kNotThisWay : StepNote::kFailed;
}

}  // namespace

struct Windows::Setup {
  const WindowLayout& layout;
  const int device, rank;
  control::Control& control;
  const Deadline deadline;
  std::vector<GpuNote> notes;  ///< [ranks]
  std::vector<int> devices;    ///< of this process's ranks

  std::size_t me() const { return static_cast<std::size_t>(rank); }
  bool is_here(std::size_t peer) const { return peer == me() || control.same_process(static_cast<int>(peer)); }

  void settle(const std::optional<Error>& mine) { control.vote(mine ? &*mine : nullptr, kOp, deadline); }

  void gather_notes() {
    GpuNote note;
    struct DeviceNote {
      std::int64_t device;
    };
    settle(caught([&] {
      note = describe_gpu(device);
      note.wish = wish_from_environment();
      note.window_id = draw_window_id();
    }));
    notes.resize(static_cast<std::size_t>(control.num_ranks()));
    control.all_gather(bytes_of(note), std::as_writable_bytes(std::span(notes)), deadline);
    settle(caught([&] { note.unreachable = find_unreachable(device, notes); }));
    control.all_gather(bytes_of(note), std::as_writable_bytes(std::span(notes)), deadline);

    const DeviceNote mine{device};
    std::vector<DeviceNote> all(notes.size());
    control.all_gather(bytes_of(mine), std::as_writable_bytes(std::span(all)), deadline);
    for (std::size_t peer = 0; peer < all.size(); ++peer) {
      const int its = static_cast<int>(all[peer].device);
      if (is_here(peer) && std::ranges::find(devices, its) == devices.end()) devices.push_back(its);
    }
  }

  WindowShape shape(Sharing sharing) const {
    std::uint64_t unit = kPageBytes;
    for (const GpuNote& note : notes) unit = std::max(unit, note.granularity);
    return WindowShape::of(layout.bytes, sharing, unit);
  }

  /// All ranks have done a step, or the error of those that failed on every rank, or `not_this_way` gets the reason.
  bool step_done(const std::optional<Error>& mine, bool last, StepNote note, std::vector<StepNote>& all,
                 std::string& not_this_way) {
    note.outcome = outcome_of(mine);
    all.resize(notes.size());
    control.all_gather(bytes_of(note), std::as_writable_bytes(std::span(all)), deadline);
    StepNote::Outcome worst = StepNote::kDone;
    for (std::size_t peer = 0; peer < all.size(); ++peer) {
      worst = std::max(worst, all[peer].outcome);
      if (all[peer].outcome == StepNote::kNotThisWay) not_this_way = fmt::format("rank {} cannot", peer);
    }
    if (worst == StepNote::kDone) return true;
    if (worst == StepNote::kFailed || last) settle(mine);
    if (mine) not_this_way = mine->what();
    return false;
  }

  bool attempt(Sharing sharing, bool last, Windows& windows) {
    const WindowShape wanted = shape(sharing);
    std::vector<std::shared_ptr<Window>> all(notes.size());
    Ticket ticket;
    std::optional<Error> mine = caught([&] {
      all[me()] = find_or_make_window(
          notes[me()].window_id, [&] { return make_window(sharing, wanted, layout.heap, device, devices, ticket); });
    });
    StepNote note;
    note.handle = ticket.handle;
    std::vector<StepNote> steps;
    std::string why;
    if (!step_done(mine, last, note, steps, why)) return next(sharing, why, windows);

    std::vector<std::vector<bootstrap::UniqueFd>> fds;
    const bool by_fd = sharing == Sharing::kDescriptors || sharing == Sharing::kHostMemory;
    if (by_fd) {
      const int own = ticket.fd.get();
      fds = control.exchange_fds({&own, 1}, deadline);
    }
    mine = caught([&] {
      for (std::size_t peer = 0; peer < all.size(); ++peer) {
        if (peer == me()) continue;
        Ticket its{by_fd ? std::move(fds[peer].at(0)) : bootstrap::UniqueFd(), steps[peer].handle};
        all[peer] =
            is_here(peer) ? find_window(notes[peer].window_id) : find_or_make_window(notes[peer].window_id, [&] {
              return map_window(sharing, wanted, device, devices, its);
            });
        if (all[peer] == nullptr) {
          core::throw_error(ErrorCode::kAborted, kOp, fmt::format("rank {} gave up during create", peer));
        }
      }
    });
    if (!step_done(mine, last, note, steps, why)) {
      // Own windows must be gone before the next way makes theirs under the same numbers: ranks of one process share them.
      all.clear();
      settle(std::nullopt);
      return next(sharing, why, windows);
    }
    windows.sharing_ = sharing;
    windows.shape_ = wanted;
    windows.windows_ = std::move(all);
    return true;
  }

  bool next(Sharing sharing, const std::string& why, Windows& windows) const {
    windows.reason_ = fmt::format("{} is not possible: {}", name_of(sharing), why);
    return false;
  }

  void start_growth(Windows& windows) {
    std::pair<bootstrap::UniqueFd, bootstrap::UniqueFd> inbox;
    settle(caught([&] { inbox = make_inbox(); }));
    const int peers_end = inbox.second.get();
    auto fds = control.exchange_fds({&peers_end, 1}, deadline);
    Growth::Links links;
    links.inbox = std::move(inbox.first);
    links.outboxes.resize(notes.size());
    for (std::size_t peer = 0; peer < notes.size(); ++peer) {
      if (!is_here(peer)) links.outboxes[peer] = std::move(fds[peer].at(0));
    }
    settle(caught(
        [&] { windows.growth_ = std::make_unique<Growth>(rank, windows.windows_, windows.shape_, std::move(links)); }));
  }
};

std::shared_ptr<Windows> Windows::share(const WindowLayout& layout, int device, int rank, control::Control& control,
                                        Deadline deadline) {
  Setup setup{layout, device, rank, control, deadline, {}, {}};
  setup.gather_notes();
  const Choice choice = choose_sharing(setup.notes);  // the same verdict everywhere, refusals included
  std::shared_ptr<Windows> windows(new Windows);
  windows->reason_ = choice.reason;
  for (std::size_t way = 0; way < choice.order.size(); ++way) {
    if (setup.attempt(choice.order[way], way + 1 == choice.order.size(), *windows)) break;
  }
  setup.start_growth(*windows);
  if (windows->sharing_ == Sharing::kHostMemory && rank == 0) {
    core::log_warning(
        fmt::format("create: GPUs exchange rows through pinned host memory, which is slow: {}", windows->reason_));
  }
  return windows;
}

}  // namespace anyep::cuda
