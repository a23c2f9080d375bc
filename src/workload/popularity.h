// How popular each expert is, for the profiles that draw in proportion to popularity.
#pragma once

#include <anyep/workload.h>

#include <cstdint>
#include <span>
#include <vector>

namespace anyep::workload {

/// Streams of one batch. `lasting` does not depend on the step, `stepwise` does.
struct Keys {
  std::uint64_t lasting = 0, stepwise = 0;
};

/// exp(N(0, sigma)) per expert; `item` tells several draws of one key apart. Draws of different sigma share their
/// noise.
std::vector<double> lognormal_popularity(int num_experts, double sigma, std::uint64_t key, std::uint64_t item = 0);

/// rank^-exponent, not shuffled.
std::vector<double> zipf_popularity(int num_items, double exponent);

/// Probability that each expert is among the top_k of a token. Off by a few per cent for few experts.
std::vector<double> expected_load(std::span<const double> popularity, int top_k);

/// Of every kind that is drawn from one popularity; kEplb's is that of the experts before they are replicated.
/// @throws Error kArgument: kMaxVio and kHotRank beyond what these experts and ranks can reach.
std::vector<double> popularity_of(const Request& request, const Keys& keys);

}  // namespace anyep::workload
