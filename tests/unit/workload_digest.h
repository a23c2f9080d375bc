// A number that stands for a batch, to compare with one that was written down.
#pragma once

#include <anyep/workload.h>

#include <bit>
#include <cstdint>

namespace anyep::workload {

/// FNV-1a over the tokens per rank, the ids and the bits of the weights, each as one word.
inline std::uint64_t digest_of(const Batch& batch) {
  std::uint64_t hash = 0xcbf29ce484222325U;
  const auto add = [&](std::uint64_t word) { hash = (hash ^ word) * 0x100000001b3U; };
  for (const std::int64_t count : batch.tokens_per_rank) add(static_cast<std::uint64_t>(count));
  for (const std::int64_t id : batch.experts) add(static_cast<std::uint64_t>(id));
  for (const float weight : batch.weights) add(std::bit_cast<std::uint32_t>(weight));
  return hash;
}

}  // namespace anyep::workload
