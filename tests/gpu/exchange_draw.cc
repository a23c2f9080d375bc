#include "exchange_draw.h"

#include <algorithm>
#include <random>

namespace anyep::test {

std::int64_t ExchangeDraw::most_rows() const {
  std::int64_t rows = 0;
  for (int rank = 0; rank < e.num_ranks; ++rank) rows += e.tokens[rank];
  return rows;
}

ExchangeDraw draw_exchange(std::uint64_t seed, int num_ranks, int rank) {
  std::mt19937_64 random(seed);
  const auto below = [&](int limit) { return static_cast<int>(random() % static_cast<unsigned>(limit)); };
  ExchangeDraw draw;
  Exchange& e = draw.e;
  e.rank = rank;
  e.num_ranks = num_ranks;
  e.top_k = 1 + below(ExchangeDraw::kMostTopK);
  e.num_experts = std::max(e.top_k, 1 + below(64));
  e.hidden = 8 * (1 + below(below(4) == 0 ? ExchangeDraw::kMostHidden / 8 : 32));
  e.percent_unused = below(3) == 0 ? below(101) : 0;
  e.salt = static_cast<std::uint32_t>(random());
  const int most = below(4) == 0 ? Exchange::kMostTokens : 64;
  for (int at = 0; at < num_ranks; ++at) e.tokens[at] = below(8) == 0 ? 0 : below(most + 1);
  draw.num_sms = 1 + below(20);
  draw.gathers = below(2) == 0;
  draw.worst_case = below(2) == 0;
  draw.again = below(3) == 0;
  return draw;
}

}  // namespace anyep::test
