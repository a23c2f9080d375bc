// Decode with MPI_Alltoallv: rows per expert into the same slabs as AnyEP's, and a weighted sum on the way back.
#pragma once

#include <cstdint>
#include <vector>

#include "bench/support/buffer.h"
#include "bench/support/low_latency_case.h"
#include "exchange.h"

namespace anyep::baselines {

/// Dispatch: counts per expert are exchanged, one row per choice is packed in (rank, expert, token) order and, at the
/// receiver, copied to its place in the slab. FP8 rows are cast once per token. Combine: the slab's rows go back in the
/// same order; the source adds them, per rank and then over ranks, as specification 10.3 says.
class MpiLowLatency {
 public:
  explicit MpiLowLatency(const bench::LowLatencyData& data);

  void dispatch();
  void combine();
  std::int64_t wrong_dispatch() const { return data_->wrong_slabs(slabs_.view()); }
  std::int64_t wrong_combine() const { return data_->wrong_sums(sums_.as<std::uint16_t>()); }

 private:
  struct Place {
    int rank = -1;  ///< -1: unused choice
    int slot = 0;   ///< in the packed buffer
  };

  void route();
  void pack();
  void place_rows();
  void place_row(int expert, std::int64_t row, const std::byte* from);
  void sum_token(std::int64_t token);

  const bench::LowLatencyData* data_;
  std::int64_t hidden_, num_scales_, top_k_;
  int local_experts_, most_experts_;
  bench::SlabMemory slabs_;
  RowExchange rows_, tokens_, answers_exchange_;
  std::vector<int> rank_of_expert_, first_expert_;
  std::vector<int> send_counts_, receive_counts_;  ///< [rank, expert there], padded to the largest rank's experts
  std::vector<int> send_, receive_;                ///< rows per rank
  std::vector<Place> places_;                      ///< [token, choice]
  std::vector<std::byte> cast_;
  bench::Buffer packed_, packed_tokens_, arrived_, arrived_tokens_, answers_, packed_answers_, returned_, partial_,
      sums_;
};

}  // namespace anyep::baselines
