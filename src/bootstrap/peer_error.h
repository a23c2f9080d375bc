// Errors that name peers.
#pragma once

#include <anyep/bootstrap.h>
#include <anyep/error.h>

#include <chrono>
#include <string>
#include <string_view>
#include <vector>

namespace anyep::bootstrap {

/// The collective step that is going on: what its errors say.
struct Step {
  std::string_view op = {};
  std::string_view phase = {};
  int rank = -1;
  std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();
  Deadline deadline = {};
};

/// "rank 3", "ranks 1, 3".
std::string name_ranks(const std::vector<int>& ranks);

/// what(): "<op>: <text>"; fills op, phase, rank, peers, elapsed_ns and limit_ns.
[[noreturn]] void throw_about(const Step& step, ErrorCode code, const std::vector<int>& peers, std::string_view text);

/// kTimeout: "<ranks> did not <what> within <limit>".
[[noreturn]] void throw_missing(const Step& step, const std::vector<int>& peers, std::string_view what);

}  // namespace anyep::bootstrap
