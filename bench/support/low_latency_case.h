// One rank's side of a decode measurement: inputs, slabs, the calls, and their exact check.
#pragma once

#include <anyep/engine.h>
#include <anyep/workload.h>

#include <cstdint>
#include <vector>

#include "bench/support/buffer.h"
#include "bench/support/content.h"

namespace anyep::bench {

/// Slabs of one rank, in memory of the caller. S = num_ranks * max_tokens rows per expert.
class SlabMemory {
 public:
  SlabMemory(int local_experts, int num_ranks, std::int64_t max_tokens, std::int64_t hidden, Wire wire);
  const ExpertSlabs& view() const { return view_; }
  std::int64_t rows_per_expert() const { return rows_; }

 private:
  std::int64_t rows_;
  Buffer x_, scales_, counts_, source_, range_;
  ExpertSlabs view_;
};

/// What a rank brings and expects. `content` must outlive it.
class LowLatencyData {
 public:
  /// Slabs hold max_tokens of each rank, or as many as the busiest rank brings.
  LowLatencyData(const workload::Batch& batch, int rank, std::int64_t hidden, Wire dispatch_wire,
                 const RowContent& content, std::int64_t max_tokens = 0);

  int rank() const { return rank_; }
  int num_ranks() const { return batch_.num_ranks(); }
  const workload::Batch& batch() const { return batch_; }
  std::int64_t hidden() const { return hidden_; }
  std::int64_t num_tokens() const { return batch_.num_tokens(rank_); }
  std::int64_t max_tokens() const { return max_tokens_; }
  int local_experts() const;
  int first_expert() const;
  Wire wire() const { return wire_; }
  Shape shape() const;
  TensorView x() const;
  Routing routing() const;
  /// Rows that cross to or from this rank in the busier direction, each (token, rank) once.
  std::int64_t wire_rows() const;

  /// Answers into x [local_experts, S, hidden] bfloat16 where dispatch's ranges say that rows lie.
  void fill_answers(const ExpertSlabs& ranges, std::uint16_t* x) const;
  /// Wrong elements of a dispatch's output.
  std::int64_t wrong_slabs(const ExpertSlabs& got) const;
  /// Wrong elements of a combine's output [num_tokens, hidden], given answers of fill_answers() on every rank.
  /// Specification 10.3: per rank a float32 fma chain rounded to bfloat16, then the ranks' float32 sum.
  std::int64_t wrong_sums(const std::uint16_t* got) const;

 private:
  bool chose(int source, std::int64_t token, std::int64_t expert) const;
  std::int64_t wrong_expert(const ExpertSlabs& got, int expert) const;
  std::int64_t wrong_row(const ExpertSlabs& got, std::int64_t row, RowContent::Row want) const;
  void sum_of_rank(std::int64_t token, int reader, std::vector<float>& sum) const;

  workload::Batch batch_;
  int rank_;
  std::int64_t hidden_, max_tokens_;
  Wire wire_;
  const RowContent* content_;
  Buffer x_;
};

/// The same behind an engine.
class LowLatencyCase {
 public:
  LowLatencyCase(Engine& engine, const LowLatencyData& data);

  void dispatch();
  void combine();
  /// The send halves return with data on its way; receive() ends them.
  Pending dispatch_send();
  Pending combine_send();
  std::int64_t wrong_dispatch() const { return data_->wrong_slabs(slabs_.view()); }
  std::int64_t wrong_combine() const { return data_->wrong_sums(sums_.as<std::uint16_t>()); }

 private:
  ExpertSlabs answers_view() const;

  Engine* engine_;
  const LowLatencyData* data_;
  SlabMemory slabs_;
  Buffer answers_, sums_;
};

}  // namespace anyep::bench
