// The checker on the device: rows whose every byte follows from where they come from, and counts of what is wrong.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace anyep::test {

/// One exchange of one rank.
struct Exchange {
  int rank = 0, num_ranks = 1, num_tokens = 0, top_k = 1, num_experts = 1;
  int hidden = 8;                  ///< BF16 elements
  std::uint32_t salt = 0;          ///< of this exchange, equal on every rank
  int percent_unused = 0;          ///< of choices that are -1
  std::uint64_t* wrong = nullptr;  ///< [1] elements that differ so far
};

/// ids [num_tokens, top_k], x [num_tokens, hidden]: what this rank brings.
void fill_exchange(const Exchange& e, std::int64_t* ids, std::uint16_t* x, cudaStream_t stream);
/// Every received row against its source rank and token.
void check_received(const Exchange& e, const std::uint16_t* rows, const std::int32_t* rows_until,
                    const std::int32_t* source, cudaStream_t stream);
/// Every combined row: as many times x as ranks host a choice of the token.
void check_combined(const Exchange& e, const std::int64_t* ids, const std::uint16_t* out, cudaStream_t stream);
/// Changes one element, so that a check must find it.
void damage(std::uint16_t* element, cudaStream_t stream);

}  // namespace anyep::test
