#include "bootstrap/peer_error.h"

#include <fmt/format.h>

#include <algorithm>

namespace anyep::bootstrap {
namespace {

std::uint64_t ns_between(Deadline from, Deadline to) {
  return to > from ? static_cast<std::uint64_t>(std::chrono::nanoseconds(to - from).count()) : 0;
}

}  // namespace

std::string name_ranks(const std::vector<int>& ranks) {
  return fmt::format("{} {}", ranks.size() == 1 ? "rank" : "ranks", fmt::join(ranks, ", "));
}

void throw_about(const Step& step, ErrorCode code, const std::vector<int>& peers, std::string_view text) {
  Error error(code, fmt::format("{}: {}", step.op, text));
  error.peers = peers;
  std::ranges::sort(error.peers);
  error.op = step.op;
  error.phase = step.phase;
  error.rank = step.rank;
  error.elapsed_ns = ns_between(step.start, std::chrono::steady_clock::now());
  error.limit_ns = ns_between(step.start, step.deadline);
  throw error;
}

void throw_missing(const Step& step, const std::vector<int>& peers, std::string_view what) {
  std::vector<int> ascending = peers;
  std::ranges::sort(ascending);
  const std::string text = fmt::format("{} did not {} within {:.3f} s", name_ranks(ascending), what,
                                       static_cast<double>(ns_between(step.start, step.deadline)) * 1e-9);
  throw_about(step, ErrorCode::kTimeout, ascending, text);
}

}  // namespace anyep::bootstrap
