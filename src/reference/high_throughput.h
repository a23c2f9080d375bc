// High-throughput dispatch and combine: all ranks' rows -> what every rank gets.
#pragma once

#include <anyep/types.h>

#include "reference/routing.h"

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace anyep::reference {

/// What dispatch writes on one rank. A field that the senders did not give stays empty.
struct ReceivedRows {
  std::int64_t num_rows = 0;          ///< rows that arrived: at most the rows of `out`
  std::vector<std::byte> x;           ///< [num_rows, row bytes]
  std::vector<std::byte> scales;      ///< [num_rows, num_scales], 4 bytes each
  std::vector<std::int64_t> experts;  ///< [rows of out, top_k] local ids; -1: hosted elsewhere, or past the last row
  std::vector<float> weights;         ///< [num_rows, top_k]; 0 where experts is -1
  std::vector<std::vector<std::byte>> extra;
};

/// Rows in (source rank, source token) order. out_rows[r]: rows of rank r's `out`; empty = exactly what it needs.
std::vector<ReceivedRows> dispatch(std::span<const Route> routes, std::span<const Rows> in,
                                   std::span<const std::int64_t> out_rows = {});

struct CombinedRows {
  std::vector<std::byte> x;    ///< [num_tokens, hidden] of the input's type
  std::vector<float> weights;  ///< [num_tokens, columns]; empty when not given
};

/// Specification 10.2 for one node: biases first, then ranks ascending, in float32; one rounding.
std::vector<CombinedRows> combine(std::span<const Route> routes, std::span<const CombineInput> in);

}  // namespace anyep::reference
