#include "low_latency.h"

#include <algorithm>
#include <cstring>

#include "core/fp8.h"
#include "core/routing.h"
#include "cpu/simd/kernels.h"

namespace anyep::baselines {
namespace {

std::size_t as_size(std::int64_t value) {
  return static_cast<std::size_t>(value);
}

std::int64_t bytes_of_row(const bench::LowLatencyData& data) {
  return data.wire() == Wire::kFP8 ? data.hidden() + core::num_fp8_scales(data.hidden()) * 4 : data.hidden() * 2;
}

}  // namespace

MpiLowLatency::MpiLowLatency(const bench::LowLatencyData& data)
    : data_(&data),
      hidden_(data.hidden()),
      num_scales_(data.wire() == Wire::kFP8 ? core::num_fp8_scales(data.hidden()) : 0),
      top_k_(data.batch().top_k),
      local_experts_(data.local_experts()),
      most_experts_(core::expert_block(data.batch().num_experts, data.num_ranks(), 0).count),
      slabs_(data.local_experts(), data.num_ranks(), data.max_tokens(), data.hidden(), data.wire()),
      rows_(bytes_of_row(data)),
      tokens_(sizeof(std::int32_t)),
      answers_exchange_(data.hidden() * 2),
      send_counts_(as_size(data.num_ranks() * most_experts_)),
      receive_counts_(send_counts_.size()),
      send_(as_size(data.num_ranks())),
      receive_(as_size(data.num_ranks())),
      places_(as_size(data.num_tokens() * top_k_)),
      cast_(as_size(rows_.row_bytes())) {
  for (int rank = 0; rank < data.num_ranks(); ++rank) {
    const core::ExpertBlock block = core::expert_block(data.batch().num_experts, data.num_ranks(), rank);
    first_expert_.push_back(block.first);
    rank_of_expert_.insert(rank_of_expert_.end(), as_size(block.count), rank);
  }
  const std::int64_t sent = data.num_tokens() * top_k_, slab_rows = local_experts_ * slabs_.rows_per_expert();
  const std::int64_t most = data.num_ranks() * data.max_tokens() * std::min<std::int64_t>(top_k_, local_experts_);
  packed_ = bench::Buffer(as_size(sent * rows_.row_bytes()));
  packed_tokens_ = bench::Buffer(as_size(sent) * sizeof(std::int32_t));
  arrived_ = bench::Buffer(as_size(most * rows_.row_bytes()));
  arrived_tokens_ = bench::Buffer(as_size(most) * sizeof(std::int32_t));
  answers_ = bench::Buffer::untouched(as_size(slab_rows * hidden_ * 2));
  packed_answers_ = bench::Buffer(as_size(most * hidden_ * 2));
  returned_ = bench::Buffer(as_size(sent * hidden_ * 2));
  partial_ = bench::Buffer(as_size(data.num_ranks() * hidden_ * 2));
  sums_ = bench::Buffer(as_size(data.num_tokens() * hidden_ * 2));
  dispatch();
  data.fill_answers(slabs_.view(), answers_.as<std::uint16_t>());
}

void MpiLowLatency::route() {
  const std::span<const std::int64_t> ids = data_->batch().experts_of(data_->rank());
  std::fill(send_counts_.begin(), send_counts_.end(), 0);
  const auto counter = [&](int rank, std::int64_t id) {
    return as_size(rank * most_experts_ + id - first_expert_[as_size(rank)]);
  };
  for (const std::int64_t id : ids) {
    if (id >= 0) ++send_counts_[counter(rank_of_expert_[as_size(id)], id)];
  }
  MPI_Alltoall(send_counts_.data(), most_experts_, MPI_INT, receive_counts_.data(), most_experts_, MPI_INT,
               MPI_COMM_WORLD);
  std::vector<int> next = prefix_sums(send_counts_);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    places_[i] = {};
    if (ids[i] < 0) continue;
    const int rank = rank_of_expert_[as_size(ids[i])];
    places_[i] = {rank, next[counter(rank, ids[i])]++};
  }
  for (std::size_t rank = 0; rank < send_.size(); ++rank) {
    const auto first = static_cast<std::ptrdiff_t>(rank) * most_experts_;
    send_[rank] = receive_[rank] = 0;
    for (std::ptrdiff_t i = first; i < first + most_experts_; ++i) {
      send_[rank] += send_counts_[static_cast<std::size_t>(i)];
      receive_[rank] += receive_counts_[static_cast<std::size_t>(i)];
    }
  }
}

void MpiLowLatency::pack() {
  const auto& kernels = cpu::simd::kernels();
  const std::int64_t bytes = rows_.row_bytes();
  const auto* const x = data_->x().as<std::uint16_t>();
  for (std::int64_t token = 0; token < data_->num_tokens(); ++token) {
    const auto* row = reinterpret_cast<const std::byte*>(x + token * hidden_);
    if (num_scales_ > 0) {
      kernels.cast_fp8({.x = x + token * hidden_,
                        .hidden = hidden_,
                        .out = reinterpret_cast<std::uint8_t*>(cast_.data()),
                        .scales = cast_.data() + hidden_});
      row = cast_.data();
    }
    for (std::int64_t at = token * top_k_; at < (token + 1) * top_k_; ++at) {
      const Place& place = places_[as_size(at)];
      if (place.rank < 0) continue;
      kernels.copy(packed_.data() + place.slot * bytes, row, as_size(bytes));
      packed_tokens_.as<std::int32_t>()[place.slot] = static_cast<std::int32_t>(token);
    }
  }
}

void MpiLowLatency::place_row(int expert, std::int64_t row, const std::byte* from) {
  const ExpertSlabs& slabs = slabs_.view();
  const std::int64_t element_bytes = static_cast<std::int64_t>(size_of(slabs.x.dtype));
  std::byte* const to =
      static_cast<std::byte*>(slabs.x.data) + (expert * slabs_.rows_per_expert() + row) * hidden_ * element_bytes;
  cpu::simd::kernels().copy(to, from, as_size(hidden_ * element_bytes));
  if (num_scales_ == 0) return;
  float* const scales = slabs.scales.as<float>() + expert * slabs.scales.strides[0] + row;
  for (std::int64_t i = 0; i < num_scales_; ++i) {
    std::memcpy(scales + i * slabs.scales.strides[2], from + hidden_ + i * 4, sizeof(float));
  }
}

void MpiLowLatency::place_rows() {
  const ExpertSlabs& slabs = slabs_.view();
  const int ranks = data_->num_ranks();
  std::fill_n(slabs.counts.as<std::int32_t>(), local_experts_, 0);
  std::int64_t at = 0;
  for (int source = 0; source < ranks; ++source) {
    for (int expert = 0; expert < local_experts_; ++expert) {
      const std::int64_t count = receive_counts_[as_size(source * most_experts_ + expert)];
      std::int32_t& begin = slabs.counts.as<std::int32_t>()[expert];
      slabs.range.as<std::int64_t>()[expert * ranks + source] = std::int64_t{begin} << 32 | count;
      for (std::int64_t i = 0; i < count; ++i, ++at, ++begin) {
        place_row(expert, begin, arrived_.data() + at * rows_.row_bytes());
        slabs.source.as<std::int32_t>()[expert * slabs_.rows_per_expert() + begin] =
            arrived_tokens_.as<std::int32_t>()[at];
      }
    }
  }
}

void MpiLowLatency::dispatch() {
  route();
  pack();
  rows_.run(packed_.data(), send_, arrived_.data(), receive_);
  tokens_.run(packed_tokens_.data(), send_, arrived_tokens_.data(), receive_);
  place_rows();
}

void MpiLowLatency::sum_token(std::int64_t token) {
  const auto& kernels = cpu::simd::kernels();
  const std::int64_t bytes = hidden_ * 2;
  const std::span<const float> weights = data_->batch().weights_of(data_->rank());
  std::vector<const void*> rows(as_size(top_k_)), partial;
  std::vector<float> of_rank(as_size(top_k_));
  for (int rank = 0; rank < data_->num_ranks(); ++rank) {
    int count = 0;
    for (std::int64_t at = token * top_k_; at < (token + 1) * top_k_; ++at) {
      const Place& place = places_[as_size(at)];
      if (place.rank != rank) continue;
      rows[as_size(count)] = returned_.data() + place.slot * bytes;
      of_rank[as_size(count++)] = weights[as_size(at)];
    }
    if (count == 0) continue;
    std::byte* const out = partial_.data() + rank * bytes;
    cpu::simd::WeightedSum sum;
    sum.out = out;
    sum.rows = rows.data();
    sum.weights = of_rank.data();
    sum.num_rows = count;
    sum.hidden = hidden_;
    kernels.weighted_sum(sum);
    partial.push_back(out);
  }
  cpu::simd::SumRows sum;
  sum.out = sums_.data() + token * bytes;
  sum.rows = partial.data();
  sum.num_rows = static_cast<int>(partial.size());
  sum.hidden = hidden_;
  kernels.sum_rows(sum);
}

void MpiLowLatency::combine() {
  const auto& kernels = cpu::simd::kernels();
  const std::int64_t bytes = hidden_ * 2;
  const int ranks = data_->num_ranks();
  std::int64_t at = 0;
  for (int source = 0; source < ranks; ++source) {
    for (int expert = 0; expert < local_experts_; ++expert) {
      const std::int64_t range = slabs_.view().range.as<std::int64_t>()[expert * ranks + source];
      const std::int64_t begin = range >> 32, count = range & 0xffffffff;
      // Rows of one source and expert lie together in the slab.
      kernels.copy(packed_answers_.data() + at * bytes,
                   answers_.data() + (expert * slabs_.rows_per_expert() + begin) * bytes, as_size(count * bytes));
      at += count;
    }
  }
  answers_exchange_.run(packed_answers_.data(), receive_, returned_.data(), send_);
  for (std::int64_t token = 0; token < data_->num_tokens(); ++token) sum_token(token);
}

}  // namespace anyep::baselines
