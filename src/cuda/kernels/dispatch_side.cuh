// What travels beside x in a dispatch: ids, weights, source index, scales, extra payloads. By warps of their own, over
// adjacent tokens, so that what a warp writes is adjacent at each receiver too.
#pragma once

#include "core/routing.h"
#include "cuda/kernels/dispatch_rows.cuh"

namespace anyep::cuda {

class SideFields {
 public:
  __device__ SideFields(const DispatchParams& p, const Turn& turn) : p_(p), turn_(turn) {}

  /// One warp. False: a wait has failed.
  __device__ bool run() {
    if (turn_.left) return false;
    const std::uint32_t tokens = static_cast<std::uint32_t>(p_.places.num_tokens);
    const std::uint32_t chunks = (tokens + kLanes - 1) / kLanes;
    const std::int64_t received =
        p_.mark_rest_until > 0 && p_.experts.given() ? p_.rows_until[p_.team.num_ranks - 1] : INT64_MAX;
    const std::int64_t rest = received < p_.mark_rest_until ? p_.mark_rest_until - received : 0;
    const auto rest_chunks = static_cast<std::uint32_t>((rest + kRestRows - 1) / kRestRows);
    Tickets tickets(p_.team, kPileSide);
    tickets.start(1);
    for (std::uint32_t chunk = tickets.next(); chunk < chunks + rest_chunks; chunk = tickets.next()) {
      if (chunk >= chunks) {
        const std::int64_t first = received + static_cast<std::int64_t>(chunk - chunks) * kRestRows;
        mark_rest(first, min(first + kRestRows, p_.mark_rest_until));
      } else if (!send(chunk * kLanes)) {
        return false;
      }
    }
    return true;
  }

 private:
  static constexpr std::int64_t kRestRows = 64;

  /// Tokens first..first+31 to every receiver, the own rank first: that hides a part of the wait for credit.
  __device__ bool send(std::uint32_t first) {
    const int n = p_.team.num_ranks, lane = lane_index();
    const auto tokens = static_cast<std::uint32_t>(p_.places.num_tokens);
    const std::uint32_t token = first + static_cast<std::uint32_t>(lane);
    for (int step = 0; step < n; ++step) {
      const int receiver = p_.team.rank + step < n ? p_.team.rank + step : p_.team.rank + step - n;
      if (step == 1 && !granted_) {
        granted_ = __all_sync(kAllLanes, lane >= n || reach_credit(p_, turn_, lane));
        if (!granted_) return false;
        __syncwarp();  // pattern F: one lane has acquired, all read the grant and store
      }
      std::int32_t row = token < tokens ? p_.places.row(token, receiver, n) : -1;
      if (p_.final_place != nullptr && token < tokens) p_.final_place[std::int64_t{token} * n + receiver] = row;
      const Grant& grant = grant_of(p_, receiver);
      std::byte* const window = p_.team.window[receiver];
      if (row >= 0 && static_cast<std::uint64_t>(row) >= grant.room) row = -1;  // never beyond the granted room
      if (!__any_sync(kAllLanes, row >= 0)) continue;
      if (row >= 0 && grant.source != Grant::kNone) {
        reinterpret_cast<std::int32_t*>(window + grant.source)[row] = static_cast<std::int32_t>(token);
      }
      const auto at = [window](std::uint64_t offset) { return offset == Grant::kNone ? nullptr : window + offset; };
      if (p_.experts.given()) {
        send_choices(first, row, receiver, grant.wide_ids != 0, at(grant.experts),
                     reinterpret_cast<float*>(at(grant.weights)));
      }
      send_field(p_.scales, first, row, at(grant.scales));
      for (int extra = 0; extra < Grant::kMaxExtra; ++extra) {
        send_field(p_.extra[extra], first, row, at(grant.extra[extra]));
      }
    }
    return true;
  }

  /// Local ids where the receiver hosts the expert, else -1 and weight 0.
  __device__ void send_choices(std::uint32_t first, std::int32_t row, int receiver, bool wide_ids, std::byte* ids,
                               float* weights) {
    constexpr int kUnroll = 4;
    const std::uint32_t top_k = p_.experts.num_elements, count = kLanes * top_k;
    const std::uint32_t inverse = (0x10000u + top_k - 1) / top_k;  // element / top_k, exact: elements are below 1024
    const core::ExpertBlock block = core::expert_block(p_.num_experts, p_.team.num_ranks, receiver);
    const bool weighted = p_.weights.given() && weights != nullptr;
    for (std::uint32_t step = 0; step < count; step += kUnroll * kLanes) {
      std::int64_t expert[kUnroll];
      float weight[kUnroll];
      std::int32_t to[kUnroll];
#pragma unroll
      for (std::uint32_t i = 0; i < kUnroll; ++i) {
        const std::uint32_t element = step + i * kLanes + static_cast<std::uint32_t>(lane_index());
        const std::uint32_t in_chunk = element * inverse >> 16, choice = element - in_chunk * top_k;
        to[i] = from_lane(row, static_cast<int>(in_chunk % kLanes));
        if (element >= count) to[i] = -1;
        if (to[i] < 0) continue;
        expert[i] = load_id(first + in_chunk, choice);
        weight[i] = weighted ? *reinterpret_cast<const float*>(element_of(p_.weights, first + in_chunk, choice)) : 0.0f;
      }
#pragma unroll
      for (std::uint32_t i = 0; i < kUnroll; ++i) {
        if (to[i] < 0) continue;
        const std::uint32_t element = step + i * kLanes + static_cast<std::uint32_t>(lane_index());
        const std::uint32_t choice = element - (element * inverse >> 16) * top_k;
        const std::int64_t at = static_cast<std::int64_t>(to[i]) * top_k + choice;
        const std::int64_t local = expert[i] - block.first;
        const bool hosted = local >= 0 && local < block.count;
        if (ids != nullptr && wide_ids) {
          reinterpret_cast<std::int64_t*>(ids)[at] = hosted ? local : -1;
        } else if (ids != nullptr) {
          reinterpret_cast<std::int32_t*>(ids)[at] = hosted ? static_cast<std::int32_t>(local) : -1;
        }
        if (weighted) weights[at] = hosted ? weight[i] : 0.0f;
      }
    }
  }

  __device__ static const std::byte* element_of(const SideField& field, std::uint32_t token, std::uint32_t element) {
    return field.data + static_cast<std::int64_t>(token) * field.row_stride + element * field.element_stride;
  }
  __device__ std::int64_t load_id(std::uint32_t token, std::uint32_t choice) const {
    const std::byte* const at = element_of(p_.experts, token, choice);
    return p_.experts.element_bytes == 8 ? *reinterpret_cast<const std::int64_t*>(at)
                                         : *reinterpret_cast<const std::int32_t*>(at);
  }

  /// Strided elements in, dense rows out, in words as wide as alignment and strides allow.
  __device__ void send_field(const SideField& field, std::uint32_t first, std::int32_t row, std::byte* to) {
    if (!field.given() || to == nullptr) return;
    const bool dense = field.element_stride == field.element_bytes;
    const std::uint32_t row_bytes = field.element_bytes * field.num_elements;
    const std::uint32_t run_bytes = dense ? row_bytes : field.element_bytes;  // adjacent in the input
    const auto strides = static_cast<std::uint64_t>(field.row_stride | (dense ? 0 : field.element_stride));
    const std::uint32_t width =
        common_alignment(address_bits(field.data) | address_bits(to) | strides | row_bytes | run_bytes);
    with_word(width, [&](auto word) { send_words<decltype(word)>(field, first, row, to, run_bytes, row_bytes); });
  }

  template <class Word>
  __device__ void send_words(const SideField& field, std::uint32_t first, std::int32_t row, std::byte* to,
                             std::uint32_t run_bytes, std::uint32_t row_bytes) {
    constexpr std::uint32_t kUnroll = 8;
    const std::uint32_t per_run = run_bytes / static_cast<std::uint32_t>(sizeof(Word));
    const std::uint32_t per_row = row_bytes / static_cast<std::uint32_t>(sizeof(Word)), count = kLanes * per_row;
    for (std::uint32_t step = 0; step < count; step += kUnroll * kLanes) {
      Word words[kUnroll];
      std::int32_t place[kUnroll];
#pragma unroll
      for (std::uint32_t i = 0; i < kUnroll; ++i) {
        const std::uint32_t index = step + i * kLanes + static_cast<std::uint32_t>(lane_index());
        const std::uint32_t in_chunk = index / per_row, word = index - in_chunk * per_row;
        place[i] = from_lane(row, static_cast<int>(in_chunk % kLanes));
        if (index >= count) place[i] = -1;
        if (place[i] < 0) continue;
        const std::uint32_t run = per_run == per_row ? 0 : word / per_run;
        words[i] = reinterpret_cast<const Word*>(element_of(field, first + in_chunk, run))[word - run * per_run];
      }
#pragma unroll
      for (std::uint32_t i = 0; i < kUnroll; ++i) {
        if (place[i] < 0) continue;
        const std::uint32_t word = (step + i * kLanes + static_cast<std::uint32_t>(lane_index())) % per_row;
        reinterpret_cast<Word*>(to + static_cast<std::int64_t>(place[i]) * row_bytes)[word] = words[i];
      }
    }
  }

  /// Own rows that nobody sends: ids of -1.
  __device__ void mark_rest(std::int64_t first, std::int64_t end) {
    const std::uint32_t row_bytes = p_.experts.num_elements * (p_.grant.wide_ids != 0 ? 8 : 4);
    std::byte* const to = p_.team.window[p_.team.rank] + p_.grant.experts + first * row_bytes;
    const auto count = static_cast<std::uint32_t>((end - first) * row_bytes / 4);
    for (auto at = static_cast<std::uint32_t>(lane_index()); at < count; at += kLanes) {
      reinterpret_cast<std::uint32_t*>(to)[at] = 0xFFFF'FFFFu;
    }
  }

  const DispatchParams& p_;
  const Turn& turn_;
  bool granted_ = false;
};

}  // namespace anyep::cuda
