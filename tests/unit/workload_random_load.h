// How long a random test runs, and from which seed: ANYEP_SOAK makes it long, ANYEP_SEED repeats a printed one.
#pragma once

#include <cstdint>
#include <cstdio>
#include <random>

#include "core/env.h"

namespace anyep::workload {

struct RandomLoad {
  int rounds;
  std::uint64_t seed;

  /// `rounds` as in the short form.
  explicit RandomLoad(int short_rounds) {
    constexpr double kLongForm = 50;
    const auto soak = core::env_factor("ANYEP_SOAK");
    rounds = soak ? static_cast<int>(kLongForm * *soak * short_rounds) : short_rounds;
    seed = core::env_integer("ANYEP_SEED").value_or(soak ? std::random_device()() : 1);
    std::printf("ANYEP_SEED=%llu, %d rounds\n", static_cast<unsigned long long>(seed), rounds);
    std::fflush(stdout);  // a crash must not swallow it
  }
};

}  // namespace anyep::workload
