// One rank's side of a high-throughput measurement: inputs, preallocated outputs, the calls, and their exact check.
#pragma once

#include <anyep/engine.h>
#include <anyep/workload.h>

#include <cstdint>
#include <vector>

#include "bench/support/buffer.h"
#include "bench/support/content.h"

namespace anyep::bench {

/// Where dispatch's output and combine's input lie: the engine's window (make_rows), or memory of the caller.
enum class Memory : std::uint8_t { kWindow, kCaller };
const char* name_of(Memory memory);

/// What dispatch moves. FP8 rows come with one float32 scale per 128 elements; the caller has cast them before.
enum class RowType : std::uint8_t { kBF16, kFP8 };
const char* name_of(RowType type);

/// A row that this rank receives.
struct Origin {
  int source = 0;
  std::int64_t token = 0;
};

/// What a rank brings and expects. Made from routing and content alone, without an engine. `content` must outlive it.
class HighThroughputData {
 public:
  HighThroughputData(const workload::Batch& batch, int rank, std::int64_t hidden, RowType type,
                     const RowContent& content);

  const workload::Batch& batch() const { return batch_; }
  int rank() const { return rank_; }
  int num_ranks() const { return batch_.num_ranks(); }
  std::int64_t hidden() const { return hidden_; }
  std::int64_t num_tokens() const { return batch_.num_tokens(rank_); }
  std::int64_t num_rows() const { return static_cast<std::int64_t>(origins_.size()); }
  /// Rows in the order that the contract promises: source rank, then token.
  const std::vector<Origin>& origins() const { return origins_; }
  RowType type() const { return type_; }
  /// Bytes of x, and of the scales, of one row.
  std::int64_t row_bytes() const;
  std::int64_t num_scales() const { return type_ == RowType::kFP8 ? (hidden_ + 127) / 128 : 0; }
  Shape shape() const;
  /// This rank's rows, scales, ids and weights.
  Rows input() const;
  Routing routing() const;

  /// Rows that this rank sends to itself, sends to others, receives from others.
  std::int64_t own_rows() const { return own_rows_; }
  std::int64_t sent_rows() const { return sent_rows_; }
  std::int64_t received_rows() const { return num_rows() - own_rows_; }

  /// Writes the rows that this rank answers with into x [num_rows, hidden] bfloat16: different bits per (rank, origin).
  void fill_answers(std::uint16_t* x) const;
  /// Wrong elements of a dispatch's output: rows, scales, and ids and weights where they are given.
  std::int64_t wrong_rows(const Rows& got) const;
  /// Wrong elements of a combine's output [num_tokens, hidden] bfloat16, given answers of fill_answers() on every rank.
  std::int64_t wrong_sums(const std::uint16_t* got) const;

 private:
  bool goes_to(std::int64_t global_token, int rank) const;
  void fill_input();
  void cast_row(RowContent::Row row, std::uint8_t* x, float* scales) const;
  std::int64_t wrong_side_data(const Rows& got, std::int64_t row) const;
  std::int64_t wrong_rows(const Rows& got, std::int64_t begin, std::int64_t end) const;
  std::int64_t wrong_sums(const std::uint16_t* got, std::int64_t begin, std::int64_t end) const;

  workload::Batch batch_;
  int rank_;
  std::int64_t hidden_, most_tokens_ = 0;
  RowType type_;
  const RowContent* content_;
  std::vector<Origin> origins_;
  std::int64_t own_rows_ = 0, sent_rows_ = 0;
  Buffer x_, scales_;
};

/// The same behind an engine.
class HighThroughputCase {
 public:
  HighThroughputCase(Engine& engine, const HighThroughputData& data, Memory memory);

  /// The whole operation: routing, counts, rows.
  void dispatch();
  /// Its two halves; the second uses the handle of the last first one.
  void route();
  void dispatch_cached();
  /// The first call makes and fills the answers.
  void combine();
  std::int64_t wrong_dispatch() const { return data_->wrong_rows(output_); }
  std::int64_t wrong_combine() const { return data_->wrong_sums(sums_.as<std::uint16_t>()); }
  /// Overwrites the outputs, so that the next check sees what the next call wrote.
  void poison();

 private:
  void make_output();
  void make_answers();

  Engine* engine_;
  const HighThroughputData* data_;
  Memory memory_;
  Handle handle_;
  OwnedRows window_output_, window_answers_;
  Buffer x_, scales_, experts_, weights_, answers_, sums_;
  Rows output_;
  TensorView answers_view_;
};

}  // namespace anyep::bench
