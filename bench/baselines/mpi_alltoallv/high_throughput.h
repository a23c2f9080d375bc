// High throughput with MPI_Alltoallv: the same work as AnyEP's dispatch and combine, as one writes it by hand.
#pragma once

#include <cstdint>
#include <vector>

#include "bench/support/buffer.h"
#include "bench/support/high_throughput_case.h"
#include "exchange.h"

namespace anyep::baselines {

/// One row per token and destination rank. Dispatch: counts are exchanged, rows packed once in destination order, then
/// moved straight to their final place; ids, weights and scales travel as a record beside each row. Combine: rows go
/// back without a pack, since those of one source lie together, and the source adds them in rank order.
class MpiHighThroughput {
 public:
  explicit MpiHighThroughput(const bench::HighThroughputData& data);

  void dispatch();
  /// With the lists and counts of an earlier dispatch().
  void dispatch_cached();
  /// The first call makes and fills the answers.
  void combine();
  std::int64_t wrong_dispatch() const { return data_->wrong_rows(output_); }
  std::int64_t wrong_combine() const { return data_->wrong_sums(sums_.as<std::uint16_t>()); }
  void poison();

 private:
  void make_answers();
  /// Takes the quicker kind of stores, which depends on sizes and caches.
  void choose_stores(bool& streaming, void (MpiHighThroughput::*call)());
  void exchange_rows();
  void exchange_answers();
  void route();
  void pack();
  void pack_record(std::int64_t token, int rank, std::byte* record) const;
  void unpack_records();

  const bench::HighThroughputData* data_;
  std::int64_t num_scales_, top_k_;
  bool stream_pack_ = true, stream_sums_ = true, has_answers_ = false;
  RowExchange rows_, records_, answers_exchange_;
  std::vector<int> rank_of_expert_, first_expert_;
  std::vector<int> send_, receive_;  ///< rows per rank
  std::vector<int> slot_;            ///< [token, rank]: row in the packed buffer, -1 = not sent
  bench::Buffer packed_, packed_records_, records_buffer_;
  bench::Buffer x_, scales_, experts_, weights_, answers_, returned_, sums_;
  Rows output_;
};

}  // namespace anyep::baselines
