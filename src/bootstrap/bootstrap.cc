#include <anyep/bootstrap.h>
#include <fmt/format.h>

#include <utility>

#include "core/check.h"
#include "core/topology.h"

namespace anyep {

Bootstrap::~Bootstrap() = default;

CallbackBootstrap::CallbackBootstrap(int rank, int num_ranks, AllGather all_gather)
    : rank_(rank), num_ranks_(num_ranks), all_gather_(std::move(all_gather)) {
  core::check_rank("bootstrap", rank, num_ranks);
  if (!all_gather_) core::throw_argument("bootstrap", "all_gather", "an empty function", "a function that gathers");
}

int CallbackBootstrap::rank() const {
  return rank_;
}

int CallbackBootstrap::num_ranks() const {
  return num_ranks_;
}

void CallbackBootstrap::all_gather(std::span<const std::byte> mine, std::span<std::byte> all, Deadline) {
  if (all.size() != mine.size() * static_cast<std::size_t>(num_ranks_)) {
    core::throw_argument("bootstrap", "all.size()", fmt::to_string(all.size()),
                         fmt::format("{} ranks x {} bytes", num_ranks_, mine.size()));
  }
  all_gather_(mine, all);
}

}  // namespace anyep
