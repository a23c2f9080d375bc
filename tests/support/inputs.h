// The tensors that one rank brings to one step: pure functions of the scenario.
#pragma once

#include <anyep/config.h>
#include <anyep/handle.h>
#include <anyep/types.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "support/guarded.h"
#include "support/scenario.h"

namespace anyep::test {

/// Tensors that live and are checked together.
class Tensors {
 public:
  /// `bytes` of poison; the address stays for the life of this object.
  std::byte* add(std::size_t bytes, std::size_t misaligned = 0);
  TensorView add(DType dtype, const Extents& shape, std::size_t misaligned = 0);
  /// All of them are inputs from now on.
  void seal();
  std::string damage() const;
  const std::vector<Guarded>& memory() const { return memory_; }

 private:
  std::vector<Guarded> memory_;
};

/// Parts of a row that are filled apart.
enum class Part : std::uint8_t { kX, kScales, kWeights, kBias0, kBias1, kExtra };

/// The key of one row of one part, `index` counting extra payloads.
std::uint64_t row_key(std::uint64_t step_key, Part part, int index, int rank, std::int64_t row);

/// The bytes of one row as a function of its key.
std::vector<std::byte> row_bytes(std::size_t bytes, Fill fill, DType dtype, std::uint64_t key);

/// Does the routing of a RouteStep with ranks of its own send this token there?
bool other_ranks(std::uint64_t step_key, int rank, std::int64_t token, int at);

/// The token whose scales a token's are: broadcast scales are those of token 0.
std::int64_t scale_token(const DispatchStep& step, std::int64_t token);

Routing routing_input(Tensors& tensors, const Scenario& scenario, int route_step, int rank);
/// Experts and weights.
Routing low_latency_routing(Tensors& tensors, const Scenario& scenario, int dispatch_step, int rank);
Rows dispatch_input(Tensors& tensors, const Scenario& scenario, int step, int rank);
TensorView low_latency_x(Tensors& tensors, const Scenario& scenario, int step, int rank);

/// x of a combine: `num_rows` rows of the handle, and the surplus as poison, into `x`.
void fill_combine_rows(const Scenario& scenario, int step, int rank, std::int64_t num_rows, const TensorView& x);
/// Weights and biases of a combine for a handle with so many rows and tokens; x stays empty.
CombineInput combine_sides(Tensors& tensors, const Scenario& scenario, int step, int rank, std::int64_t num_rows,
                           std::int64_t num_tokens);

/// Row `row` of a local expert's slab in a low-latency combine.
std::vector<std::byte> slab_row(std::uint64_t step_key, int rank, std::int64_t expert, std::int64_t row,
                                std::int64_t hidden);
/// The first counts[e] rows of every local expert e; the rest of the slab is poison (NaN patterns).
void fill_slab(const Scenario& scenario, int step, int rank, std::span<const std::int32_t> counts,
               const TensorView& slab);

}  // namespace anyep::test
