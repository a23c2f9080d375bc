// Low-latency dispatch.
//
//   after   slab x[e][begin + i] == the i-th token, in token order, that source s sends to local expert e,
//           cast as asked; begin = prefix over sources; range[e][s] = begin << 32 | count
//   roles   send: one record per (token, destination) into region [turn mod 4][me] there, own rank included
//           receive: each record is copied to every chosen expert's row
//   syncs   one mark per peer and turn; counts lie under it. No credit: four regions (models/low_latency_regions.py)
//   needs   the same shape, wire format and hook on every rank (the call's digest)
#include <algorithm>
#include <cstring>
#include <vector>

#include "core/fp8.h"
#include "core/low_latency.h"
#include "cpu/backend.h"
#include "cpu/low_latency.h"
#include "cpu/simd/kernels.h"

namespace anyep::cpu {
namespace {

/// Slabs larger than this leave the cache anyway: written around it.
constexpr std::int64_t kStreamFromBytes = 2 << 20;

class DispatchSend : LowLatencyRun {
 public:
  DispatchSend(Group& group, backend::LowLatencyCall& call)
      : LowLatencyRun(group, call, Half::kSend),
        ids_(call.routing.experts, call.shape.num_experts),
        table_(ids_, call.shape.num_experts, group.num_ranks()),
        layout_(core::dispatch_region(call.shape, group.num_ranks(), call.options.wire)),
        payload_bytes_(static_cast<std::size_t>(core::dispatch_payload_bytes(call.shape, call.options.wire))),
        scale_bytes_(static_cast<std::size_t>(core::num_dispatch_scales(call.shape, call.options.wire)) * 4),
        records_(static_cast<std::size_t>(group.num_ranks()), 0) {}

  void execute() {
    run.at(kBeforeSend);
    for (std::int64_t token = 0; token < ids_.num_tokens(); ++token) {
      send(token);
      if (token == ids_.num_tokens() / 2) run.at(kMidSend);
    }
    for (int step = 0; step < ranks(); ++step) finish((me() + step) % ranks());
    run.at(kAfterFlag);
  }

 private:
  void send(std::int64_t token) {
    const ChoiceTable::Choice* const choices = table_.of(token);
    const std::byte* payload = call_.x.as<const std::byte>() + token * call_.shape.hidden * 2;
    const std::byte* scales = nullptr;
    if (scale_bytes_ != 0) {
      cast(payload);
      payload = reinterpret_cast<const std::byte*>(row_.data());
      scales = reinterpret_cast<const std::byte*>(row_scales_.data());
    }
    for (int at = 0; at < table_.top_k; ++at) {
      const int rank = choices[at].rank;
      const bool seen =
          rank < 0 || std::any_of(choices, choices + at, [rank](const auto& one) { return one.rank == rank; });
      if (!seen && !masked(rank)) put(token, choices, rank, payload, scales);
    }
  }

  void cast(const std::byte* x) {
    row_.resize(payload_bytes_);
    row_scales_.resize(scale_bytes_ / 4);
    core::Fp8Cast cast;
    cast.x = reinterpret_cast<const std::uint16_t*>(x);
    cast.hidden = call_.shape.hidden;
    cast.out = row_.data();
    cast.scales = row_scales_.data();
    cast.rule = call_.options.round_scale ? core::ScaleRule::kPowerOfTwo : core::ScaleRule::kExact;
    cast.form = call_.options.wire == Wire::kUE8M0 ? core::ScaleForm::kUE8M0 : core::ScaleForm::kF32;
    kernels_.cast_fp8(cast);
  }

  void put(std::int64_t token, const ChoiceTable::Choice* choices, int rank, const std::byte* payload,
           const std::byte* scales) {
    const std::uint64_t index = records_[static_cast<std::size_t>(rank)]++;
    std::byte* const record = region(rank, me()) + layout_.records + index * layout_.stride;
    auto* const listed = reinterpret_cast<core::LowLatencyChoice*>(record + layout_.choices);
    std::int32_t num_choices = 0;
    for (int at = 0; at < table_.top_k; ++at) {
      const ChoiceTable::Choice& choice = choices[at];
      if (choice.rank == rank && choice.first) listed[num_choices++] = {choice.expert, choice.position};
    }
    const std::int32_t begin[2] = {static_cast<std::int32_t>(token), num_choices};
    std::memcpy(record, begin, sizeof begin);
    if (scale_bytes_ != 0) std::memcpy(record + layout_.scales, scales, scale_bytes_);
    kernels_.copy(record + layout_.payload, payload, payload_bytes_);
  }

  /// Counts and head, then the mark.
  void finish(int rank) {
    if (masked(rank)) return;
    const core::ExpertBlock there = block(rank);
    std::byte* const at = region(rank, me());
    if (there.count > 0) {
      std::memcpy(at + layout_.counts, table_.per_expert.data() + there.first,
                  static_cast<std::size_t>(there.count) * sizeof(std::int32_t));
    }
    *reinterpret_cast<core::LowLatencyHead*>(at) =
        make_head(ids_.num_tokens(), records_[static_cast<std::size_t>(rank)]);
    publish(group_.layout().low_latency_arrived, rank);
  }

  const simd::Kernels& kernels_ = simd::kernels();
  const core::ExpertIds ids_;
  const ChoiceTable table_;
  const core::DispatchRegionLayout layout_;
  const std::size_t payload_bytes_, scale_bytes_;
  std::vector<std::size_t> records_;  ///< [rank] sent so far
  std::vector<std::uint8_t> row_;     ///< a token, cast
  std::vector<std::uint32_t> row_scales_;
};

class DispatchReceive : LowLatencyRun {
 public:
  DispatchReceive(Group& group, backend::LowLatencyCall& call)
      : LowLatencyRun(group, call, Half::kReceive),
        layout_(core::dispatch_region(call.shape, group.num_ranks(), call.options.wire)),
        payload_bytes_(core::dispatch_payload_bytes(call.shape, call.options.wire)),
        num_scales_(core::num_dispatch_scales(call.shape, call.options.wire)),
        slab_rows_(group.num_ranks() * call.shape.max_tokens),
        local_(block(me()).count) {
    begin_.assign(static_cast<std::size_t>(local_ * ranks()), 0);
    count_.assign(begin_.size(), 0);
    records_.assign(static_cast<std::size_t>(ranks()), 0);
  }

  void execute() {
    run.at(kInReceive);
    for (int step = 0; step < ranks(); ++step) read_counts((me() + step) % ranks());
    const std::int64_t rows = fix_ranges();
    move_ = rows * payload_bytes_ >= kStreamFromBytes ? kernels_.stream : kernels_.copy;
    for (int step = 0; step < ranks(); ++step) expand((me() + step) % ranks());
    simd::stream_fence();
    end_late();
  }

 private:
  std::size_t pair(std::int64_t expert, int source) const {
    return static_cast<std::size_t>(expert * ranks() + source);
  }

  void read_counts(int source) {
    if (!landed(group_.layout().low_latency_arrived, source, kInReceive)) return;
    const core::LowLatencyHead first = head(source, 0, static_cast<std::uint64_t>(call_.shape.max_tokens));
    records_[static_cast<std::size_t>(source)] = first.num_entries;
    const auto* const counts = reinterpret_cast<const std::int32_t*>(region(me(), source) + layout_.counts);
    for (std::int64_t expert = 0; expert < local_; ++expert) {
      const std::int32_t count = counts[expert];
      if (count < 0 || static_cast<std::uint32_t>(count) > first.num_tokens) {
        run.corrupt(source, "a count of tokens", first.num_tokens, static_cast<std::uint32_t>(count));
      }
      count_[pair(expert, source)] = count;
    }
  }

  std::int64_t fix_ranges() {
    std::int64_t all = 0;
    for (std::int64_t expert = 0; expert < local_; ++expert) {
      std::int64_t rows = 0;
      for (int source = 0; source < ranks(); ++source) {
        const std::size_t at = pair(expert, source);
        begin_[at] = rows;
        call_.slabs.range.as<std::int64_t>()[at] = rows << 32 | count_[at];
        rows += count_[at];
      }
      call_.slabs.counts.as<std::int32_t>()[expert] = static_cast<std::int32_t>(rows);
      if (call_.options.received.given()) {
        call_.options.received.as<std::int32_t>()[expert] += static_cast<std::int32_t>(rows);
      }
      all += rows;
    }
    return all;
  }

  void expand(int source) {
    for (std::size_t index = 0; index < records_[static_cast<std::size_t>(source)]; ++index) {
      const std::byte* const record = region(me(), source) + layout_.records + index * layout_.stride;
      std::int32_t begin[2];
      std::memcpy(begin, record, sizeof begin);
      const std::int64_t most = core::most_choices_per_rank(call_.shape, ranks());
      if (begin[1] < 0 || begin[1] > most)
        run.corrupt(source, "a number of choices", static_cast<std::uint64_t>(most),
                    static_cast<std::uint32_t>(begin[1]));
      const auto* const choices = reinterpret_cast<const core::LowLatencyChoice*>(record + layout_.choices);
      for (std::int32_t at = 0; at < begin[1]; ++at) place(source, begin[0], choices[at], record);
    }
  }

  void place(int source, std::int32_t token, core::LowLatencyChoice choice, const std::byte* record) {
    if (choice.expert < 0 || choice.expert >= local_) {
      run.corrupt(source, "a local expert", static_cast<std::uint64_t>(local_),
                  static_cast<std::uint32_t>(choice.expert));
    }
    const std::size_t at = pair(choice.expert, source);
    if (choice.position < 0 || choice.position >= count_[at]) {
      run.corrupt(source, "a position", static_cast<std::uint64_t>(count_[at]),
                  static_cast<std::uint32_t>(choice.position));
    }
    const std::int64_t row = begin_[at] + choice.position;
    const std::int64_t slab_row = choice.expert * slab_rows_ + row;
    move_(call_.slabs.x.as<std::byte>() + slab_row * payload_bytes_, record + layout_.payload,
          static_cast<std::size_t>(payload_bytes_));
    call_.slabs.source.as<std::int32_t>()[slab_row] = token;
    if (num_scales_ == 0) return;
    // Column-major: the token runs fastest.
    auto* const scales = call_.slabs.scales.as<std::uint32_t>() + choice.expert * num_scales_ * slab_rows_ + row;
    for (std::int64_t column = 0; column < num_scales_; ++column) {
      std::memcpy(scales + column * slab_rows_, record + layout_.scales + column * 4, 4);
    }
  }

  const simd::Kernels& kernels_ = simd::kernels();
  const core::DispatchRegionLayout layout_;
  const std::int64_t payload_bytes_, num_scales_, slab_rows_, local_;
  void (*move_)(void*, const void*, std::size_t) = nullptr;
  std::vector<std::int64_t> begin_;  ///< [local expert][source] first row
  std::vector<std::int32_t> count_;  ///< likewise
  std::vector<std::size_t> records_;
};

}  // namespace

void CpuBackend::low_latency_dispatch_send(backend::LowLatencyCall& call) {
  ids_out_of_range_ += core::ExpertIds(call.routing.experts, call.shape.num_experts).count_out_of_range();
  DispatchSend(*group_, call).execute();
}

void CpuBackend::low_latency_dispatch_receive(backend::LowLatencyCall& call) {
  DispatchReceive(*group_, call).execute();
}

}  // namespace anyep::cpu
