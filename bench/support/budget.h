// How much memory an engine of a measurement or job gets.
#pragma once

#include <anyep/config.h>

#include <cstdint>

namespace anyep::bench {

/// rows_bytes that leave `heap_bytes` for rows in the window beside full-sized rings.
std::int64_t rows_bytes_for(std::int64_t heap_bytes, int num_ranks);
/// Rows that a rank can receive at most, each of `row_bytes`, placed in the window.
std::int64_t most_rows_bytes(int num_ranks, std::int64_t tokens_per_rank, std::int64_t row_bytes);

}  // namespace anyep::bench
