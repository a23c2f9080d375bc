// What rows carry: what each token brings, and what is answered for it. A measurement takes random numbers, a job real
// ones; the checks are the same.
#pragma once

#include <cstdint>
#include <span>

#include "bench/support/payload.h"

namespace anyep::bench {

/// Rows are bits of bfloat16 elements. An implementation may build a row in `scratch` (of a row's size) or return
/// memory of its own; the span is valid until the next call with the same scratch.
class RowContent {
 public:
  using Row = std::span<const std::uint16_t>;
  using Scratch = std::span<std::uint16_t>;

  virtual ~RowContent() = default;
  /// Row of token `token` of rank `source`.
  virtual Row token(int source, std::int64_t token, Scratch scratch) const = 0;
  /// High throughput: what rank `reader` answers for that token.
  virtual Row answer_of_rank(int source, std::int64_t token, int reader, Scratch scratch) const = 0;
  /// Low latency: what global expert `expert` answers for it.
  virtual Row answer_of_expert(int source, std::int64_t token, int expert, Scratch scratch) const = 0;
};

/// Random rows, all different.
class RandomContent final : public RowContent {
 public:
  RandomContent(std::int64_t hidden, int num_ranks, std::int64_t most_tokens_per_rank, std::uint64_t seed);
  Row token(int source, std::int64_t token, Scratch scratch) const override;
  Row answer_of_rank(int source, std::int64_t token, int reader, Scratch scratch) const override;
  Row answer_of_expert(int source, std::int64_t token, int expert, Scratch scratch) const override;

 private:
  Row row(int source, std::int64_t token, std::int64_t kind) const;

  int num_ranks_;
  std::int64_t most_tokens_;
  Payload payload_;
};

}  // namespace anyep::bench
