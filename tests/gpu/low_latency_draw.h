// Random low-latency pairs: their shapes, how they run, where their tensors lie.
#pragma once

#include <anyep/handle.h>
#include <anyep/types.h>

#include <cstddef>
#include <cstdint>
#include <random>

#include "low_latency_pair.h"

namespace anyep::test {

/// One pair, equal on every rank but for call.rank.
struct PairDraw {
  PairCall call;
  bool dispatch_hook = false, combine_hook = false;
  int dispatch_sms = 0, combine_sms = 0;  ///< 0 = the plan chooses

  Shape shape() const;
};

/// What pairs are drawn from.
struct DrawLimits {
  int num_ranks = 2;
  int most_tokens = 256;                                   ///< per rank; num_ranks times it at most PairCall::kMostRows
  std::int64_t most_elements = 12 << 20;                   ///< of a rank's slab, about; with one token any
  std::int64_t most_wire_bytes = std::int64_t{192} << 20;  ///< low_latency_bytes that a pair may need
};
PairDraw draw_pair(std::mt19937_64& random, const DrawLimits& limits);

/// Cuts a rank's tensors of a pair out of memory at `base`; bytes() of it. replay and findings stay null.
class PairPlaces {
 public:
  PairPlaces(const PairCall& call, std::byte* base);
  const PairMemory& memory() const { return memory_; }
  std::size_t bytes() const { return used_; }

 private:
  std::byte* take(std::int64_t bytes);
  std::byte* base_;
  std::size_t used_ = 0;
  PairMemory memory_;
};

/// Views of a rank's tensors as the calls take them.
TensorView x_view(const PairCall& call, const PairMemory& memory);
TensorView out_view(const PairCall& call, const PairMemory& memory);
Routing routing_view(const PairCall& call, const PairMemory& memory);
ExpertSlabs slabs_view(const PairCall& call, const PairMemory& memory);    ///< out of dispatch
ExpertSlabs answers_view(const PairCall& call, const PairMemory& memory);  ///< into combine

}  // namespace anyep::test
