#include <anyep/workload.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/check.h"
#include "workload/math.h"
#include "workload/profile.h"
#include "workload/random.h"
#include "workload/rows.h"

namespace anyep::workload {
namespace {

constexpr std::int64_t kMostTokens = std::int64_t{1} << 32;

void check_range(std::string_view argument, std::int64_t got, std::int64_t least, std::int64_t most) {
  if (got >= least && got <= most) return;
  core::throw_argument("generate", argument, fmt::format("{}", got), fmt::format("{}..{}", least, most));
}

void check_profile(const Profile& profile) {
  const Form& form = form_of(profile.kind);
  for (const Parameter& parameter : form.parameters) {
    const double value = parameter.field == Field::kValue   ? profile.value
                         : parameter.field == Field::kCount ? profile.count
                         : parameter.field == Field::kKept  ? profile.kept
                                                            : parameter.least;
    if (!(value >= parameter.least && value <= parameter.most)) {
      core::throw_argument("generate", "profile", fmt::format("{} with {}", form.text, value),
                           fmt::format("{} to {}", parameter.least, parameter.most));
    }
  }
}

void check_request(const Request& request) {
  check_profile(request.profile);
  check_range("num_experts", request.num_experts, 1, 1 << 20);
  check_range("top_k", request.top_k, 1, std::min(32, request.num_experts));
  check_range("num_ranks", request.num_ranks, 1, 1 << 16);
  check_range("tokens_per_rank", request.tokens_per_rank, 0, kMostTokens / request.num_ranks);
}

/// Log-normal around a bit less than half of the most, clipped there; an eighth of the ranks idle, and always one of
/// several; never all.
std::vector<std::int64_t> ragged_tokens(const Request& request, std::uint64_t key) {
  constexpr double kSigma = 0.7, kMedian = 0.45;
  std::vector<std::int64_t> tokens(static_cast<std::size_t>(request.num_ranks));
  for (std::size_t rank = 0; rank < tokens.size(); ++rank) {
    Stream stream(key, Purpose::kTokensPerRank, rank);
    const double drawn = kMedian * static_cast<double>(request.tokens_per_rank) * exp(kSigma * stream.gaussian());
    tokens[rank] = std::clamp<std::int64_t>(
        static_cast<std::int64_t>(drawn), std::min<std::int64_t>(1, request.tokens_per_rank), request.tokens_per_rank);
    if (stream.below(8) == 0) tokens[rank] = 0;
  }
  Stream stream(key, Purpose::kTokensPerRank, tokens.size());
  const std::uint32_t idle = stream.below(static_cast<std::uint32_t>(tokens.size()));
  if (tokens.size() > 1) tokens[idle] = 0;
  if (std::accumulate(tokens.begin(), tokens.end(), std::int64_t{0}) == 0) {
    tokens[(idle + 1) % tokens.size()] = request.tokens_per_rank;
  }
  return tokens;
}

}  // namespace

Batch generate(const Request& request) {
  check_request(request);
  Keys keys;
  keys.lasting = mix(request.seed, static_cast<std::uint64_t>(request.profile.kind) + 1);
  keys.stepwise = mix(keys.lasting, request.step);
  Batch batch;
  batch.top_k = request.top_k;
  batch.num_experts = request.profile.kind == Kind::kEplb ? request.profile.count : request.num_experts;
  batch.tokens_per_rank.assign(static_cast<std::size_t>(request.num_ranks), request.tokens_per_rank);
  if (request.profile.kind == Kind::kRagged) batch.tokens_per_rank = ragged_tokens(request, keys.stepwise);

  const std::unique_ptr<RowMaker> maker = make_row_maker(request, keys);
  const auto num_tokens = static_cast<std::size_t>(batch.num_tokens());
  const auto top_k = static_cast<std::size_t>(request.top_k);
  batch.experts.resize(num_tokens * top_k);
  batch.weights.resize(num_tokens * top_k);
  for (std::size_t token = 0; token < num_tokens; ++token) {
    maker->make(token, std::span(batch.experts).subspan(token * top_k, top_k),
                std::span(batch.weights).subspan(token * top_k, top_k));
  }
  return batch;
}

}  // namespace anyep::workload
