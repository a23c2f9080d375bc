// Random exchanges of high throughput, and how each runs.
#pragma once

#include <cstdint>

#include "exchange.h"

namespace anyep::test {

struct ExchangeDraw {
  static constexpr int kMostHidden = 2048, kMostTopK = 8;
  Exchange e;
  int num_sms = 1;
  bool gathers = false;     ///< combine takes the rows where dispatch has put them, in the window
  bool worst_case = false;  ///< rows for all tokens of all ranks: the host waits for no count
  bool again = false;       ///< the handle serves a second dispatch and combine

  int operations() const { return again ? 5 : 3; }
  std::int64_t most_rows() const;
};

/// The same seed gives the same draw, on every rank but for `rank`.
ExchangeDraw draw_exchange(std::uint64_t seed, int num_ranks, int rank);

}  // namespace anyep::test
