#include "workload/popularity.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <utility>

#include "core/check.h"
#include "core/routing.h"
#include "workload/math.h"
#include "workload/random.h"
#include "workload/sampler.h"

namespace anyep::workload {
namespace {

// "Bounded power law" of the published fits: up to 0.8 of the tokens, here those of the calibration table.
constexpr double kPowerLawBound = 0.8 * 4096;
constexpr double kUsualSigma = 1.1;  // published average imbalance of DeepSeek-R1 (TensorRT-LLM) and of Qwen3-235B
constexpr double kBurstSigma = 0.4;
constexpr double kBurstFactor = 10;
constexpr int kBurstShare = 32;  // one expert of this many bursts
constexpr double kMostSigma = 6;

/// The argument in [low, high] for which the growing function `value` reaches `target`.
double bisect(double low, double high, double target, const std::function<double(double)>& value) {
  for (int round = 0; round < 36; ++round) {
    const double middle = (low + high) / 2;
    (value(middle) < target ? low : high) = middle;
  }
  return (low + high) / 2;
}

void shuffle(std::vector<double>& values, Stream stream) {
  for (std::size_t left = values.size(); left > 1; --left) {
    std::swap(values[left - 1], values[stream.below(static_cast<std::uint32_t>(left))]);
  }
}

[[noreturn]] void out_of_reach(const Request& request, std::string_view least, double most) {
  core::throw_argument("generate", "profile", to_text(request.profile), fmt::format("{} to {:.3g}", least, most),
                       fmt::format("More cannot be reached with {} experts, top-{}, on {} rank{}", request.num_experts,
                                   request.top_k, request.num_ranks, request.num_ranks == 1 ? "" : "s"));
}

/// max/mean - 1 over ranks of the pairs that a popularity gives in the long run.
double expected_max_vio(const Request& request, const std::vector<double>& popularity) {
  const std::vector<double> load = expected_load(popularity, request.top_k);
  std::vector<double> pairs(static_cast<std::size_t>(request.num_ranks));
  for (std::size_t expert = 0; expert < load.size(); ++expert) {
    const int rank = core::rank_of_expert(request.num_experts, request.num_ranks, static_cast<int>(expert));
    pairs[static_cast<std::size_t>(rank)] += load[expert];
  }
  const double sum = std::accumulate(pairs.begin(), pairs.end(), 0.0);
  return *std::max_element(pairs.begin(), pairs.end()) * request.num_ranks / sum - 1;
}

/// The least sigma that reaches the target: MaxVio need not grow with sigma everywhere.
std::vector<double> max_vio_popularity(const Request& request, const Keys& keys) {
  const auto with_sigma = [&](double sigma) { return lognormal_popularity(request.num_experts, sigma, keys.lasting); };
  const auto value = [&](double sigma) { return expected_max_vio(request, with_sigma(sigma)); };
  constexpr double kStep = 0.25;
  double most = value(0);
  if (request.profile.value <= most) return with_sigma(0);
  for (double sigma = kStep; sigma <= kMostSigma; sigma += kStep) {
    const double reached = value(sigma);
    if (reached >= request.profile.value) {
      return with_sigma(bisect(sigma - kStep, sigma, request.profile.value, value));
    }
    most = std::max(most, reached);
  }
  out_of_reach(request, "maxvio:0", most);
}

/// Expected rows of the hot rank over the mean of the others, when each of its experts is `factor` times as popular.
class HotRankRatio {
 public:
  HotRankRatio(const Request& request, int hot_rank) : request_(request), hot_rank_(hot_rank) {
    hot_experts_ = block(hot_rank);
    cold_experts_ = request.num_experts - hot_experts_;
  }

  double operator()(double factor) const {
    const std::vector<double> hits = hot_hits(factor);
    double cold_rows = 0;
    for (int rank = 0; rank < request_.num_ranks; ++rank) {
      if (rank == hot_rank_) continue;
      for (int hot = 0; hot <= request_.top_k; ++hot) {
        cold_rows += hits[static_cast<std::size_t>(hot)] * (1 - miss(block(rank), request_.top_k - hot));
      }
    }
    return (1 - hits[0]) * (request_.num_ranks - 1) / cold_rows;
  }

 private:
  int block(int rank) const { return core::expert_block(request_.num_experts, request_.num_ranks, rank).count; }

  /// Probability of h hot choices, by choices drawn one after another.
  std::vector<double> hot_hits(double factor) const {
    std::vector<double> hits(static_cast<std::size_t>(request_.top_k) + 1);
    hits[0] = 1;
    for (int drawn = 0; drawn < request_.top_k; ++drawn) {
      for (int hot = std::min(drawn, hot_experts_); hot >= 0; --hot) {
        const double hot_left = factor * (hot_experts_ - hot);
        const double cold_left = std::max(0, cold_experts_ - (drawn - hot));
        double& here = hits[static_cast<std::size_t>(hot)];
        const double to_hot = hot_left + cold_left > 0 ? here * hot_left / (hot_left + cold_left) : 0;
        hits[static_cast<std::size_t>(hot) + 1] += to_hot;
        here -= to_hot;
      }
    }
    return hits;
  }

  /// Probability that `choices` distinct cold experts avoid `experts` of them.
  double miss(int experts, int choices) const {
    double probability = 1;
    for (int drawn = 0; drawn < choices; ++drawn) {
      probability *= static_cast<double>(std::max(0, cold_experts_ - experts - drawn)) / (cold_experts_ - drawn);
    }
    return probability;
  }

  const Request& request_;
  int hot_rank_, hot_experts_ = 0, cold_experts_ = 0;
};

std::vector<double> hot_rank_popularity(const Request& request) {
  if (request.num_ranks < 2) {
    core::throw_argument("generate", "profile", to_text(request.profile), "with 2 ranks or more");
  }
  const int hot_rank = static_cast<int>(request.seed % static_cast<std::uint64_t>(request.num_ranks));
  const HotRankRatio ratio(request, hot_rank);
  constexpr double kMostLog = 40;
  const double most = ratio(exp(kMostLog));
  if (request.profile.value > most) out_of_reach(request, "hot-rank:1", most);
  const double factor = exp(bisect(-2, kMostLog, request.profile.value, [&](double x) { return ratio(exp(x)); }));
  std::vector<double> popularity(static_cast<std::size_t>(request.num_experts), 1.0);
  const core::ExpertBlock hot = core::expert_block(request.num_experts, request.num_ranks, hot_rank);
  std::fill_n(popularity.begin() + hot.first, hot.count, factor);
  return popularity;
}

std::vector<double> power_law_popularity(const Request& request, const Keys& keys) {
  Stream stream(keys.lasting, Purpose::kPopularity, 0);
  const double exponent = 1 - request.profile.value;
  std::vector<double> popularity(static_cast<std::size_t>(request.num_experts));
  for (double& value : popularity) {
    const double u = stream.uniform();
    if (std::fabs(exponent) < 1e-9) {
      value = pow(kPowerLawBound, u);
    } else {
      value = pow(1 + u * (pow(kPowerLawBound, exponent) - 1), 1 / exponent);
    }
  }
  return popularity;
}

std::vector<double> rotating_popularity(const Request& request, const Keys& keys) {
  std::vector<double> popularity = lognormal_popularity(request.num_experts, kUsualSigma, keys.lasting);
  const auto size = static_cast<std::uint64_t>(popularity.size());
  const std::uint64_t moves = request.step / static_cast<std::uint64_t>(request.profile.count);
  const std::uint64_t shift = (moves % size) * (size / 8 + 1) % size;
  std::rotate(popularity.begin(), popularity.begin() + static_cast<std::ptrdiff_t>(shift), popularity.end());
  return popularity;
}

std::vector<double> burst_popularity(const Request& request, const Keys& keys) {
  std::vector<double> popularity = lognormal_popularity(request.num_experts, kBurstSigma, keys.lasting);
  const auto period = static_cast<std::uint64_t>(request.profile.count);
  if (request.step % period != period - 1) return popularity;
  Stream stream(keys.stepwise, Purpose::kShuffle, 0);
  const int bursting = std::max(1, request.num_experts / kBurstShare);
  std::vector<std::int64_t> chosen(static_cast<std::size_t>(bursting));
  Sampler(std::vector<double>(popularity.size(), 1.0)).draw_distinct(stream, chosen);
  for (const std::int64_t expert : chosen) popularity[static_cast<std::size_t>(expert)] *= kBurstFactor;
  return popularity;
}

}  // namespace

std::vector<double> lognormal_popularity(int num_experts, double sigma, std::uint64_t key, std::uint64_t item) {
  Stream stream(key, Purpose::kPopularity, item);
  std::vector<double> popularity(static_cast<std::size_t>(num_experts));
  for (double& value : popularity) value = exp(sigma * stream.gaussian());
  return popularity;
}

std::vector<double> zipf_popularity(int num_items, double exponent) {
  std::vector<double> popularity(static_cast<std::size_t>(num_items));
  for (std::size_t item = 0; item < popularity.size(); ++item) {
    popularity[item] = pow(static_cast<double>(item + 1), -exponent);
  }
  return popularity;
}

std::vector<double> expected_load(std::span<const double> popularity, int top_k) {
  // Drawing in proportion to popularity is a race of exponential clocks; the first top_k to ring are chosen, and of
  // many experts those are about the ones that ring before one fixed time.
  const auto [least, most] = std::minmax_element(popularity.begin(), popularity.end());
  const auto sum_at = [&](double log_time) {
    double sum = 0;
    for (const double value : popularity) sum += 1 - exp(-value * exp(log_time));
    return sum;
  };
  constexpr double kMargin = 30;
  const double time = exp(bisect(-log(*most) - kMargin, -log(*least) + kMargin, top_k, sum_at));
  std::vector<double> load;
  for (const double value : popularity) load.push_back(1 - exp(-value * time));
  return load;
}

std::vector<double> popularity_of(const Request& request, const Keys& keys) {
  const double value = request.profile.value;
  switch (request.profile.kind) {
    case Kind::kLognormal:
      return lognormal_popularity(request.num_experts, value, keys.lasting);
    case Kind::kEplb:
      return lognormal_popularity(request.num_experts, kUsualSigma, keys.lasting);
    case Kind::kMaxVio:
      return max_vio_popularity(request, keys);
    case Kind::kSorted: {
      std::vector<double> popularity = lognormal_popularity(request.num_experts, value, keys.lasting);
      std::sort(popularity.begin(), popularity.end(), std::greater<>());
      return popularity;
    }
    case Kind::kPowerLaw:
      return power_law_popularity(request, keys);
    case Kind::kZipf: {
      std::vector<double> popularity = zipf_popularity(request.num_experts, value);
      shuffle(popularity, Stream(keys.lasting, Purpose::kShuffle, 0));
      return popularity;
    }
    case Kind::kHotRank:
      return hot_rank_popularity(request);
    case Kind::kRotating:
      return rotating_popularity(request, keys);
    case Kind::kBurst:
      return burst_popularity(request, keys);
    default:
      return std::vector<double>(static_cast<std::size_t>(request.num_experts), 1.0);
  }
}

}  // namespace anyep::workload
