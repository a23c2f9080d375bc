// What tests of GpuRank on several ranks share: threads, one rank each.
#pragma once

#include <gtest/gtest.h>

#include <chrono>

#include "company.h"
#include "support/gpu_rank.h"
#include "support/mirror.h"

namespace anyep::test {

/// The parameter is the number of ranks. Without a GPU there is nothing that these tests could run on: they skip.
class GpuRanks : public testing::TestWithParam<int> {
 protected:
  static constexpr auto kLimit = std::chrono::seconds(20);

  void SetUp() override {
    if (num_gpus() == 0) GTEST_SKIP() << "no GPU";
  }
  /// body(GpuRank&, rank); closes its engine where that is right.
  template <class Body>
  static void with_ranks(const Body& body) {
    with_threads(GetParam(), [&](Bootstrap& bootstrap, int rank, std::barrier<>&) {
      GpuRank me(bootstrap, kLimit, num_gpus());
      body(me, rank);
    });
  }
};

}  // namespace anyep::test
