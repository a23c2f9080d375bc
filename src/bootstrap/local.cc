#include "bootstrap/local.h"

#include <anyep/bootstrap.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <numeric>
#include <system_error>
#include <thread>

#include "core/check.h"
#include "core/topology.h"

namespace anyep {
namespace {

void check_num_ranks(int num_ranks) {
  core::check_rank("local group", 0, num_ranks);
}

// A child inherits unwritten output; it would come twice.
void flush_standard_streams() {
  std::fflush(nullptr);
}

[[noreturn]] void run_child(int rank, pid_t parent, const std::function<void(int rank)>& body) {
  // Nobody else would end the ranks of a caller that is killed.
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  int status = 0;
  if (::getppid() != parent) ::_exit(1);
  try {
    body(rank);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "rank %d: %s\n", rank, error.what());
    status = 1;
  } catch (...) {
    std::fprintf(stderr, "rank %d: an exception that is no std::exception\n", rank);
    status = 1;
  }
  flush_standard_streams();
  ::_exit(status);  // the caller's exit handlers are not the child's
}

int wait_for(pid_t child) {
  int status = 0;
  while (::waitpid(child, &status, 0) < 0) {
    if (errno != EINTR) return -1;  // someone else has waited for it
  }
  return status;
}

}  // namespace

struct LocalGroup::State {
  std::shared_ptr<bootstrap::LocalBoard> shared;
};

LocalGroup::LocalGroup(int num_ranks) {
  check_num_ranks(num_ranks);
  state_ = std::make_shared<State>(State{std::make_shared<bootstrap::LocalBoard>(num_ranks)});
}

LocalGroup::~LocalGroup() = default;
LocalGroup::LocalGroup(LocalGroup&&) noexcept = default;
LocalGroup& LocalGroup::operator=(LocalGroup&&) noexcept = default;

int LocalGroup::num_ranks() const {
  return state_ == nullptr ? 0 : state_->shared->board.num_ranks();
}

std::unique_ptr<Bootstrap> LocalGroup::member(int rank) const {
  return member_without(rank, {});
}

std::unique_ptr<Bootstrap> LocalGroup::member_without(int rank, std::span<const int> gone) const {
  if (state_ == nullptr) core::throw_error(ErrorCode::kState, "local group", "the group was moved to another object");
  const int num = num_ranks();
  const std::string allowed = fmt::format("0..{}", num - 1);
  core::check_rank("local group", rank, num);
  std::vector<int> members(static_cast<std::size_t>(num));
  std::iota(members.begin(), members.end(), 0);
  for (const int left_out : gone) {
    if (left_out < 0 || left_out >= num) core::throw_argument("local group", "gone", fmt::to_string(left_out), allowed);
    if (left_out == rank) {
      core::throw_argument("local group", "gone", fmt::to_string(left_out), "ranks other than the caller's");
    }
    std::erase(members, left_out);
  }
  const auto at = std::ranges::find(members, rank);
  const auto index = static_cast<int>(at - members.begin());
  return std::make_unique<bootstrap::LocalMember>(state_->shared, std::move(members), index);
}

std::vector<int> LocalGroup::run_processes(int num_ranks, const std::function<void(int rank)>& body) {
  check_num_ranks(num_ranks);
  flush_standard_streams();
  const pid_t parent = ::getpid();
  std::vector<pid_t> children;
  for (int rank = 0; rank < num_ranks; ++rank) {
    const pid_t child = ::fork();
    if (child == 0) run_child(rank, parent, body);
    if (child < 0) {
      const int error = errno;
      for (const pid_t started : children) ::kill(started, SIGKILL);
      for (const pid_t started : children) wait_for(started);
      core::throw_resource("local group", "fork", error);
    }
    children.push_back(child);
  }
  std::vector<int> statuses;
  for (const pid_t child : children) statuses.push_back(wait_for(child));
  return statuses;
}

void LocalGroup::run_threads(int num_ranks, const std::function<void(int rank)>& body) {
  check_num_ranks(num_ranks);
  std::vector<std::exception_ptr> errors(static_cast<std::size_t>(num_ranks));
  std::vector<std::thread> threads;
  int refused = 0;
  for (int rank = 0; rank < num_ranks && refused == 0; ++rank) {
    try {
      threads.emplace_back([&body, rank, &error = errors[static_cast<std::size_t>(rank)]] {
        try {
          body(rank);
        } catch (...) {
          error = std::current_exception();
        }
      });
    } catch (const std::system_error& error) {
      refused = error.code().value();
    }
  }
  for (std::thread& thread : threads) thread.join();
  if (refused != 0) core::throw_resource("local group", "starting a thread", refused);
  for (const std::exception_ptr& error : errors) {
    if (error != nullptr) std::rethrow_exception(error);
  }
}

}  // namespace anyep
