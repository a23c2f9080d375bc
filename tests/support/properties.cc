#include "support/properties.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <stdexcept>

#include "support/inputs.h"

namespace anyep::test {
namespace {

struct Broken : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void require(bool condition, const std::string& text) {
  if (!condition) throw Broken(text);
}

/// A token and where it comes from.
struct Origin {
  int rank = 0;
  std::int64_t token = 0;
  friend auto operator<=>(const Origin&, const Origin&) = default;
};

int first_expert(int rank, int num_ranks, int num_experts) {
  return rank * (num_experts / num_ranks) + std::min(rank, num_experts % num_ranks);
}

/// The rank that hosts a choice, -1 for what is no expert.
int host_of(std::int64_t expert, int num_ranks, int num_experts) {
  if (expert < 0 || expert >= num_experts) return -1;
  int rank = num_ranks - 1;
  while (first_expert(rank, num_ranks, num_experts) > expert) --rank;
  return rank;
}

double value_of(DType dtype, const std::byte* at) {
  if (dtype == DType::kF32) {
    float value = 0;
    std::memcpy(&value, at, 4);
    return value;
  }
  std::uint16_t bits = 0;
  std::memcpy(&bits, at, 2);
  const int mantissa_bits = dtype == DType::kBF16 ? 7 : 10;
  const int bias = dtype == DType::kBF16 ? 127 : 15;
  const int exponent = (bits & 0x7fff) >> mantissa_bits;
  const double mantissa = std::ldexp(bits & ((1 << mantissa_bits) - 1), -mantissa_bits);
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, 1 - bias) : std::ldexp(1 + mantissa, exponent - bias);
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

double value_of_fp8(std::byte code) {
  const int bits = std::to_integer<int>(code);
  const int exponent = (bits >> 3) & 15;
  const double magnitude = exponent == 0 ? std::ldexp(bits & 7, -9) : std::ldexp(8 + (bits & 7), exponent - 10);
  return (bits & 0x80) != 0 ? -magnitude : magnitude;
}

/// Half a unit in the last place, relative.
double roundoff(DType dtype) {
  return dtype == DType::kBF16 ? 0x1p-8 : dtype == DType::kF16 ? 0x1p-11 : 0x1p-24;
}

/// Index of an origin in an ordered list that has it.
std::int64_t index_of(const std::vector<Origin>& origins, Origin from) {
  return std::lower_bound(origins.begin(), origins.end(), from) - origins.begin();
}

class Properties {
 public:
  Properties(const Scenario& scenario, const Outputs& outputs) : scenario_(scenario), outputs_(outputs) {}

  void check() {
    for (int step = 0; step < static_cast<int>(scenario_.steps.size()); ++step) {
      try {
        std::visit([&](const auto& what) { check(step, what); }, scenario_.steps[static_cast<std::size_t>(step)].what);
      } catch (const Broken& broken) {
        throw Broken("step " + std::to_string(step) + " (" + name_of(scenario_.steps[static_cast<std::size_t>(step)]) +
                     "): " + broken.what());
      }
    }
  }

 private:
  const RankOutputs& out(int rank) const { return outputs_[static_cast<std::size_t>(rank)]; }

  bool goes(int handle, Origin from, int at) const {
    using Given = RouteStep::Given;
    const auto* adopt = std::get_if<AdoptStep>(&scenario_.steps[static_cast<std::size_t>(handle)].what);
    if (adopt != nullptr) return goes(adopt->handle, from, at);
    const auto& route = scenario_.step<RouteStep>(handle);
    if (route.given == Given::kOtherRanks || route.given == Given::kOnlyRanks) {
      return other_ranks(scenario_.key(handle), from.rank, from.token, at);
    }
    const Choices& choices = route.choices;
    for (int slot = 0; slot < choices.top_k; ++slot) {
      if (host_of(choices.at(from.rank, from.token, slot), scenario_.num_ranks, choices.num_experts) == at) return true;
    }
    return false;
  }

  /// The rows that a rank receives, in order; worked out once.
  const std::vector<Origin>& rows(int handle, int at) {
    const auto [found, added] = rows_.try_emplace({handle, at});
    std::vector<Origin>& origins = found->second;
    if (!added) return origins;
    const Choices& choices = scenario_.route_of(handle).choices;
    for (int from = 0; from < scenario_.num_ranks; ++from) {
      for (std::int64_t token = 0; token < choices.num_tokens(from); ++token) {
        if (goes(handle, {from, token}, at)) origins.push_back({from, token});
      }
    }
    return origins;
  }

  void check_handle(int step) {
    std::vector<std::vector<std::int32_t>> places;
    for (const RankOutputs& from : outputs_) places.push_back(from.values<std::int32_t>(step, "place"));
    for (int at = 0; at < scenario_.num_ranks; ++at) {
      const std::vector<Origin>& origins = rows(step, at);
      const auto source = out(at).values<std::int32_t>(step, "source");
      const auto until = out(at).values<std::int32_t>(step, "rows_until");
      require(source.size() == origins.size(), "number of rows");
      require(num_places(step, at) == origins.size(), "a place where nothing was sent");
      for (std::size_t row = 0; row < origins.size(); ++row) {
        const Origin from = origins[row];
        const auto begin = from.rank == 0 ? 0 : until[static_cast<std::size_t>(from.rank - 1)];
        require(source[row] == from.token, "source of a row");
        require(static_cast<int>(row) >= begin && static_cast<int>(row) < until[static_cast<std::size_t>(from.rank)],
                "range of a rank's rows");
        require(places[static_cast<std::size_t>(from.rank)]
                      [static_cast<std::size_t>(from.token * scenario_.num_ranks + at)] == static_cast<int>(row),
                "place of a token");
      }
    }
  }

  /// Places at rank `at` that are not -1, over all tokens of all ranks.
  std::size_t num_places(int step, int at) const {
    std::size_t count = 0;
    for (const RankOutputs& from : outputs_) {
      const auto place = from.values<std::int32_t>(step, "place");
      for (auto i = static_cast<std::size_t>(at); i < place.size(); i += outputs_.size())
        count += place[i] != -1 ? 1 : 0;
    }
    return count;
  }

  void check(int step, const RouteStep& what) {
    check_handle(step);
    if (what.given == RouteStep::Given::kOnlyRanks) return;
    for (int at = 0; at < scenario_.num_ranks; ++at) {
      const int first = first_expert(at, scenario_.num_ranks, what.choices.num_experts);
      const auto pairs = out(at).values<std::int64_t>(step, "pairs");
      for (std::size_t expert = 0; expert < pairs.size(); ++expert) {
        std::int64_t count = 0;
        for (const auto& ids : what.choices.ids) {
          count += std::count(ids.begin(), ids.end(), first + static_cast<std::int64_t>(expert));
        }
        require(pairs[expert] == count, "pairs of an expert");
      }
    }
  }

  void check(int step, const AdoptStep&) { check_handle(step); }

  void require_row(int at, int step, const std::string& field, std::int64_t row,
                   const std::vector<std::byte>& expected) const {
    const Bytes& all = out(at).get(step, field);
    const std::size_t first = static_cast<std::size_t>(row) * expected.size();
    require(first + expected.size() <= all.size() &&
                std::equal(expected.begin(), expected.end(), all.begin() + static_cast<std::ptrdiff_t>(first)),
            field + " of row " + std::to_string(row) + " on rank " + std::to_string(at));
  }

  void check(int step, const DispatchStep& what) {
    const std::uint64_t key = scenario_.key(step);
    for (int at = 0; at < scenario_.num_ranks; ++at) {
      const std::vector<Origin>& origins = rows(what.handle, at);
      const auto room = what.out_rows.empty() ? static_cast<std::int64_t>(origins.size())
                                              : what.out_rows[static_cast<std::size_t>(at)];
      const auto count = std::min(room, static_cast<std::int64_t>(origins.size()));
      const std::size_t row_bytes = static_cast<std::size_t>(what.hidden) * size_of(what.dtype);
      require(out(at).get(step, "x").size() == static_cast<std::size_t>(count) * row_bytes, "size of x");
      for (std::int64_t row = 0; row < count; ++row) {
        const Origin from = origins[static_cast<std::size_t>(row)];
        const auto bytes = [&](Part part, int index, std::int64_t token, std::size_t size) {
          const Fill fill = part == Part::kX ? what.fill : Fill::kBits;
          return test::row_bytes(size, fill, what.dtype, row_key(key, part, index, from.rank, token));
        };
        require_row(at, step, "x", row, bytes(Part::kX, 0, from.token, row_bytes));
        if (what.num_scales > 0) {
          require_row(
              at, step, "scales", row,
              bytes(Part::kScales, 0, scale_token(what, from.token), static_cast<std::size_t>(what.num_scales) * 4));
        }
        for (std::size_t i = 0; i < what.extra.size(); ++i) {
          require_row(at, step, "extra" + std::to_string(i), row,
                      bytes(Part::kExtra, static_cast<int>(i), from.token, static_cast<std::size_t>(what.extra[i])));
        }
      }
      if (what.with_experts) check_choices(step, what, at, origins, room);
    }
  }

  void check_choices(int step, const DispatchStep& what, int at, const std::vector<Origin>& origins,
                     std::int64_t room) const {
    const Choices& choices = scenario_.route_of(what.handle).choices;
    const int first = first_expert(at, scenario_.num_ranks, choices.num_experts);
    const auto top_k = static_cast<std::size_t>(choices.top_k);
    const auto experts = out(at).values<std::int64_t>(step, "experts");
    require(experts.size() == static_cast<std::size_t>(room) * top_k, "size of experts");
    std::vector<std::uint32_t> weights;
    if (what.with_weights) weights = out(at).values<std::uint32_t>(step, "weights");
    for (std::size_t row = 0; row < static_cast<std::size_t>(room); ++row) {
      for (std::size_t slot = 0; slot < top_k; ++slot) {
        std::int64_t local = -1;
        std::uint32_t weight = 0;
        if (row < origins.size()) {
          const Origin from = origins[row];
          const std::int64_t id = choices.at(from.rank, from.token, static_cast<int>(slot));
          if (host_of(id, scenario_.num_ranks, choices.num_experts) == at) {
            local = id - first;
            const auto bytes = test::row_bytes(top_k * 4, Fill::kBits, DType::kF32,
                                               row_key(scenario_.key(step), Part::kWeights, 0, from.rank, from.token));
            std::memcpy(&weight, bytes.data() + 4 * slot, 4);
          }
        }
        require(experts[row * top_k + slot] == local, "local expert of row " + std::to_string(row));
        if (what.with_weights && row < origins.size()) {
          require(weights[row * top_k + slot] == weight, "weight of row " + std::to_string(row));
        }
      }
    }
  }

  /// Sum and sum of magnitudes of what one element of a combine adds up.
  struct Terms {
    double sum = 0, magnitude = 0;
    void add(double term) {
      sum += term;
      magnitude += std::abs(term);
    }
  };

  void check(int step, const CombineStep& what) {
    const std::uint64_t key = scenario_.key(step);
    const std::size_t width = size_of(what.dtype);
    const std::size_t row_bytes = static_cast<std::size_t>(what.hidden) * width;
    for (int rank = 0; rank < scenario_.num_ranks; ++rank) {
      const Bytes& x = out(rank).get(step, "x");
      const std::int64_t tokens = scenario_.route_of(what.handle).choices.num_tokens(rank);
      require(x.size() == static_cast<std::size_t>(tokens) * row_bytes, "size of x");
      for (std::int64_t token = 0; token < tokens; ++token) {
        std::vector<Terms> terms(static_cast<std::size_t>(what.hidden));
        const auto add = [&](const Bytes& row) {
          for (std::size_t i = 0; i < terms.size(); ++i) terms[i].add(value_of(what.dtype, row.data() + i * width));
        };
        const auto add_bias = [&](Part part) {
          add(test::row_bytes(row_bytes, Fill::kFinite, what.dtype, row_key(key, part, 0, rank, token)));
        };
        if (what.num_biases > 0 && !what.only_second_bias) add_bias(Part::kBias0);
        if (what.num_biases > 1 || what.only_second_bias) add_bias(Part::kBias1);
        for (int at = 0; at < scenario_.num_ranks; ++at) {
          if (goes(what.handle, {rank, token}, at)) add(combined_row(step, what, at, {rank, token}, row_bytes));
        }
        for (std::size_t i = 0; i < terms.size(); ++i) {
          const double got = value_of(what.dtype, x.data() + static_cast<std::size_t>(token) * row_bytes + i * width);
          const double allowed = roundoff(what.dtype) * std::abs(terms[i].sum) + 0x1p-20 * terms[i].magnitude;
          require(std::abs(got - terms[i].sum) <= allowed, "sum of token " + std::to_string(token) + " on rank " +
                                                               std::to_string(rank) + ", element " + std::to_string(i));
        }
      }
    }
  }

  /// The row that rank `at` brings to a combine for one token.
  Bytes combined_row(int step, const CombineStep& what, int at, Origin from, std::size_t row_bytes) {
    if (what.rows_of >= 0) {
      return test::row_bytes(row_bytes, Fill::kFinite, what.dtype,
                             row_key(scenario_.key(what.rows_of), Part::kX, 0, from.rank, from.token));
    }
    const std::int64_t row = index_of(rows(what.handle, at), from);
    return test::row_bytes(row_bytes, Fill::kFinite, what.dtype, row_key(scenario_.key(step), Part::kX, 0, at, row));
  }

  /// Rows of one expert, in order.
  const std::vector<Origin>& rows_of_expert(int dispatch, std::int64_t expert) {
    const auto [found, added] = rows_of_expert_.try_emplace({dispatch, expert});
    std::vector<Origin>& origins = found->second;
    if (!added) return origins;
    const Choices& choices = scenario_.step<LowLatencyDispatchStep>(dispatch).choices;
    for (int from = 0; from < scenario_.num_ranks; ++from) {
      for (std::int64_t token = 0; token < choices.num_tokens(from); ++token) {
        bool chosen = false;
        for (int slot = 0; slot < choices.top_k; ++slot) chosen = chosen || choices.at(from, token, slot) == expert;
        if (chosen) origins.push_back({from, token});
      }
    }
    return origins;
  }

  void check(int step, const LowLatencyDispatchStep& what) {
    const Choices& choices = what.choices;
    for (int at = 0; at < scenario_.num_ranks; ++at) {
      const int first = first_expert(at, scenario_.num_ranks, choices.num_experts);
      const auto counts = out(at).values<std::int32_t>(step, "counts");
      const auto source = out(at).values<std::int32_t>(step, "source");
      const auto range = out(at).values<std::int64_t>(step, "range");
      std::int64_t packed_row = 0;
      for (std::size_t expert = 0; expert < counts.size(); ++expert) {
        const auto& origins = rows_of_expert(step, first + static_cast<std::int64_t>(expert));
        require(static_cast<std::size_t>(counts[expert]) == origins.size(), "count of an expert");
        for (std::size_t row = 0; row < origins.size(); ++row, ++packed_row) {
          const Origin from = origins[row];
          const auto range_of_rank = static_cast<std::uint64_t>(
              range[expert * static_cast<std::size_t>(scenario_.num_ranks) + static_cast<std::size_t>(from.rank)]);
          require(row >= range_of_rank >> 32 && row - (range_of_rank >> 32) < (range_of_rank & 0xffffffffu), "range");
          require(source[static_cast<std::size_t>(packed_row)] == from.token, "source of a row");
          check_slab_row(step, what, at, packed_row, from);
        }
      }
    }
  }

  void check_slab_row(int step, const LowLatencyDispatchStep& what, int at, std::int64_t row, Origin from) const {
    const auto x = test::row_bytes(static_cast<std::size_t>(what.hidden) * 2, what.fill, DType::kBF16,
                                   row_key(scenario_.key(step), Part::kX, 0, from.rank, from.token));
    if (what.wire == Wire::kBF16) return require_row(at, step, "x", row, x);
    if (what.fill == Fill::kBits) return;  // NaNs and infinities: the oracle's cast has tests of its own
    const std::byte* codes = out(at).get(step, "x").data() + row * what.hidden;
    const Bytes& scales = out(at).get(step, "scales");
    for (std::int64_t i = 0; i < what.hidden; ++i) {
      const double scale = scale_of(scales, what, row, i / 128);
      int exponent = 0;
      require(!(what.round_scale || what.wire == Wire::kUE8M0) || std::frexp(scale, &exponent) == 0.5, "scale");
      const double exact = value_of(DType::kBF16, x.data() + 2 * i);
      const double error = std::abs(value_of_fp8(codes[i]) * scale - exact);
      require(error <= 0x1.01p-4 * std::abs(exact) + 0x1p-10 * scale, "FP8 value of row " + std::to_string(row));
    }
  }

  static double scale_of(const Bytes& scales, const LowLatencyDispatchStep& what, std::int64_t row,
                         std::int64_t block) {
    if (what.wire == Wire::kUE8M0) {
      const std::int64_t words = (what.hidden + 511) / 512;
      return std::ldexp(1.0, std::to_integer<int>(scales[static_cast<std::size_t>(row * words * 4 + block)]) - 127);
    }
    const std::int64_t columns = (what.hidden + 127) / 128;
    return value_of(DType::kF32, scales.data() + (row * columns + block) * 4);
  }

  void check(int step, const LowLatencyCombineStep& what) {
    const auto& dispatch = scenario_.step<LowLatencyDispatchStep>(what.dispatch);
    const Choices& choices = dispatch.choices;
    const std::int64_t hidden = scenario_.shape_of(what).hidden;
    for (int rank = 0; rank < scenario_.num_ranks; ++rank) {
      const Bytes& x = out(rank).get(step, "x");
      require(x.size() == static_cast<std::size_t>(choices.num_tokens(rank) * hidden) * 2, "size of x");
      for (std::int64_t token = 0; token < choices.num_tokens(rank); ++token) {
        const std::vector<Terms> terms = low_latency_terms(step, what, {rank, token}, hidden);
        for (std::size_t i = 0; i < terms.size(); ++i) {
          const double got = value_of(DType::kBF16, x.data() + (token * hidden + static_cast<std::int64_t>(i)) * 2);
          const double share = what.wire == Wire::kLogFMT ? 0.022 + 0x1p-7 : 0x1p-7;
          require(std::abs(got - terms[i].sum) <= share * terms[i].magnitude + 1e-9,
                  "sum of token " + std::to_string(token) + " on rank " + std::to_string(rank));
        }
      }
    }
  }

  std::vector<Terms> low_latency_terms(int step, const LowLatencyCombineStep& what, Origin from, std::int64_t hidden) {
    const Choices& choices = scenario_.step<LowLatencyDispatchStep>(what.dispatch).choices;
    std::vector<Terms> terms(static_cast<std::size_t>(hidden));
    const std::uint64_t weights = row_key(scenario_.key(what.dispatch), Part::kWeights, 0, from.rank, from.token);
    for (int slot = 0; slot < choices.top_k; ++slot) {
      const std::int64_t expert = choices.at(from.rank, from.token, slot);
      const int at = host_of(expert, scenario_.num_ranks, choices.num_experts);
      if (at < 0) continue;
      const std::int64_t row = index_of(rows_of_expert(what.dispatch, expert), from);
      const Bytes bytes = slab_row(scenario_.key(step), at,
                                   expert - first_expert(at, scenario_.num_ranks, choices.num_experts), row, hidden);
      const double weight = weight_of(weights, static_cast<std::uint64_t>(slot));
      for (std::size_t i = 0; i < terms.size(); ++i)
        terms[i].add(weight * value_of(DType::kBF16, bytes.data() + 2 * i));
    }
    return terms;
  }

  template <class T>
  void check(int, const T&) const {}

  const Scenario& scenario_;
  const Outputs& outputs_;
  std::map<std::pair<int, int>, std::vector<Origin>> rows_;
  std::map<std::pair<int, std::int64_t>, std::vector<Origin>> rows_of_expert_;
};

}  // namespace

std::string broken_property(const Scenario& scenario, const Outputs& outputs) {
  try {
    Properties(scenario, outputs).check();
  } catch (const Broken& broken) {
    return broken.what();
  }
  return {};
}

}  // namespace anyep::test
