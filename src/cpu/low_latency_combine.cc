// Low-latency combine.
//
//   after   out[t] == for each rank, ascending, that hosts a choice of t: FP32 from 0, fma(weight, row) over its choices
//           in top-k order, rounded to BF16; the FP32 sum of those, rounded once (specification 10.3).
//           Exact arithmetic: one sum over all choices.
//   roles   with sums: homes ask (weights go to the expert ranks), expert ranks answer one row per (token, rank),
//           homes add. Per choice: expert ranks send every row, homes do all arithmetic. The bits are the same.
//   syncs   two marks per peer and turn: asked (weights are there), arrived (rows are there).
//           The send half of the form per choice waits for nobody.
//   needs   the same shape, wire format, hook and arithmetic on every rank (the call's digest)
#include <algorithm>
#include <cstring>
#include <vector>

#include "core/logfmt.h"
#include "core/low_latency.h"
#include "cpu/backend.h"
#include "cpu/low_latency.h"
#include "cpu/simd/kernels.h"

namespace anyep::cpu {
namespace {

/// What send and receive of a combine share.
class CombineHalf : protected LowLatencyRun {
 protected:
  CombineHalf(Group& group, backend::LowLatencyCall& call, Half half)
      : LowLatencyRun(group, call, half),
        exact_(group.tuning().exact_combine),
        sums_(core::sums_at_expert_rank(call.options, exact_)),
        logfmt_(call.options.wire == Wire::kLogFMT),
        layout_(core::combine_region(call.shape, group.num_ranks(), sums_, call.options.wire)),
        hidden_(call.shape.hidden),
        slab_rows_(group.num_ranks() * call.shape.max_tokens) {}

  const simd::Kernels& kernels_ = simd::kernels();
  const bool exact_, sums_, logfmt_;
  const core::CombineRegionLayout layout_;
  const std::int64_t hidden_, slab_rows_;
};

class CombineSend : CombineHalf {
 public:
  CombineSend(Group& group, backend::LowLatencyCall& call)
      : CombineHalf(group, call, Half::kSend), local_(block(me()).count) {}

  void execute() {
    run.at(kBeforeSend);
    if (sums_) {
      ask();
      run.at(kMidSend);
      for (int step = 0; step < ranks(); ++step) answer((me() + step) % ranks());
    } else {
      send_rows();
    }
    run.at(kAfterFlag);
  }

 private:
  /// Weights to the ranks that have the rows.
  void ask() {
    const core::ExpertIds ids(call_.routing.experts, call_.shape.num_experts);
    const ChoiceTable table(ids, call_.shape.num_experts, ranks());
    const auto* const weights = call_.routing.weights.as<const float>();
    std::vector<std::size_t> entries(static_cast<std::size_t>(ranks()), 0);
    for (std::int64_t token = 0; token < ids.num_tokens(); ++token) {
      for (int at = 0; at < table.top_k; ++at) {
        const ChoiceTable::Choice& choice = table.of(token)[at];
        if (choice.rank < 0 || masked(choice.rank)) continue;
        auto* const list = reinterpret_cast<core::LowLatencyWeight*>(region(choice.rank, me()) + layout_.weights);
        list[entries[static_cast<std::size_t>(choice.rank)]++] = {static_cast<std::int32_t>(token), choice.expert,
                                                                  choice.position, weights[token * table.top_k + at]};
      }
    }
    for (int step = 0; step < ranks(); ++step) {
      const int rank = (me() + step) % ranks();
      if (masked(rank)) continue;
      *reinterpret_cast<core::LowLatencyHead*>(region(rank, me())) =
          make_head(ids.num_tokens(), entries[static_cast<std::size_t>(rank)]);
      publish(group_.layout().low_latency_asked, rank);
    }
  }

  /// This rank's sum of every token that a home asks about.
  void answer(int home) {
    if (masked(home) || !landed(group_.layout().low_latency_asked, home, kMidSend)) return;
    const auto most =
        static_cast<std::uint64_t>(call_.shape.max_tokens) * static_cast<std::uint64_t>(call_.shape.top_k);
    const core::LowLatencyHead asked = head(home, 0, most);
    const auto* const list = reinterpret_cast<const core::LowLatencyWeight*>(region(me(), home) + layout_.weights);
    std::byte* const to = region(home, me());
    for (std::uint32_t at = 0; at < asked.num_entries;) {
      const std::int32_t token = list[at].token;
      if (token < 0 || static_cast<std::uint32_t>(token) >= asked.num_tokens) {
        run.corrupt(home, "a token", asked.num_tokens, static_cast<std::uint32_t>(token));
      }
      rows_.clear();
      weights_.clear();
      do {
        const core::LowLatencyWeight choice = list[at];
        if (const std::byte* const row = find_row(home, choice)) {
          rows_.push_back(row);
          weights_.push_back(choice.weight);
        }
      } while (++at < asked.num_entries && list[at].token == token);
      simd::WeightedSum sum;
      sum.out = to + layout_.rows + static_cast<std::uint64_t>(token) * layout_.row_stride;
      sum.rows = rows_.data();
      sum.weights = weights_.data();
      sum.num_rows = static_cast<int>(rows_.size());
      sum.hidden = hidden_;
      kernels_.weighted_sum(sum);
    }
    finish(home, asked.num_entries);
  }

  /// Null where the ids no longer match the dispatch that made the ranges: memory-safe, an error in checked mode.
  const std::byte* find_row(int home, const core::LowLatencyWeight& asked) {
    if (asked.expert < 0 || asked.expert >= local_) {
      run.corrupt(home, "a local expert", static_cast<std::uint64_t>(local_), static_cast<std::uint32_t>(asked.expert));
    }
    const auto [begin, count] = range(asked.expert, home);
    if (asked.position >= 0 && asked.position < count) {
      const std::int64_t row = asked.expert * slab_rows_ + begin + asked.position;
      return call_.slabs.x.as<const std::byte>() + row * hidden_ * 2;
    }
    if (group_.tuning().checked) run.disagree(home, "the experts of combine are not those of dispatch");
    return nullptr;
  }

  struct Range {
    std::int64_t begin, count;
  };
  /// A source's rows of an expert, cut to the slab.
  Range range(std::int64_t expert, int source) const {
    const std::int64_t packed = call_.slabs.range.as<const std::int64_t>()[expert * ranks() + source];
    const std::int64_t begin = std::clamp<std::int64_t>(packed >> 32, 0, slab_rows_);
    const std::int64_t count = std::clamp<std::int64_t>(packed & 0xFFFF'FFFF, 0, slab_rows_ - begin);
    return {begin, count};
  }

  /// Every row, to slot [token][index among the token's experts here].
  void send_rows() {
    const auto most = static_cast<std::size_t>(call_.shape.max_tokens);
    for (int step = 0; step < ranks(); ++step) {
      const int home = (me() + step) % ranks();
      if (masked(home)) continue;
      next_index_.assign(most, 0);
      std::byte* const to = region(home, me());
      std::size_t sent = 0;
      for (std::int64_t expert = 0; expert < local_; ++expert) {
        const auto [begin, count] = range(expert, home);
        for (std::int64_t row = expert * slab_rows_ + begin; row < expert * slab_rows_ + begin + count; ++row) {
          sent += send_row(to, row);
        }
      }
      finish(home, std::min(sent, most));
      if (step == 0) run.at(kMidSend);
    }
  }

  std::size_t send_row(std::byte* to, std::int64_t row) {
    const std::int32_t token = call_.slabs.source.as<const std::int32_t>()[row];
    if (token < 0 || token >= call_.shape.max_tokens) return 0;
    const std::uint64_t index = next_index_[static_cast<std::size_t>(token)];
    if (index >= layout_.rows_per_token) return 0;
    ++next_index_[static_cast<std::size_t>(token)];
    std::byte* const slot =
        to + layout_.rows + (static_cast<std::uint64_t>(token) * layout_.rows_per_token + index) * layout_.row_stride;
    const std::byte* const x = call_.slabs.x.as<const std::byte>() + row * hidden_ * 2;
    if (logfmt_) {
      kernels_.logfmt_encode(reinterpret_cast<const std::uint16_t*>(x), hidden_, reinterpret_cast<std::uint8_t*>(slot));
    } else {
      kernels_.copy(slot, x, static_cast<std::size_t>(hidden_) * 2);
    }
    return 1;
  }

  void finish(int home, std::size_t num_entries) {
    *reinterpret_cast<core::LowLatencyHead*>(region(home, me()) + layout_.answer) = make_head(0, num_entries);
    publish(group_.layout().low_latency_arrived, home);
  }

  const std::int64_t local_;
  std::vector<const void*> rows_;
  std::vector<float> weights_;
  std::vector<std::uint8_t> next_index_;  ///< [token] rows sent
};

class CombineReceive : CombineHalf {
 public:
  CombineReceive(Group& group, backend::LowLatencyCall& call)
      : CombineHalf(group, call, Half::kReceive),
        ids_(call.routing.experts, call.shape.num_experts),
        table_(ids_, call.shape.num_experts, group.num_ranks()),
        here_(static_cast<std::size_t>(group.num_ranks()), 0),
        partial_(static_cast<std::size_t>(group.num_ranks() * call.shape.hidden)) {
    if (logfmt_) decoded_.resize(static_cast<std::size_t>(table_.top_k * hidden_));
  }

  void execute() {
    run.at(kInReceive);
    for (int step = 0; step < ranks(); ++step) {
      const int rank = (me() + step) % ranks();
      if (!landed(group_.layout().low_latency_arrived, rank, kInReceive)) continue;
      head(rank, layout_.answer, static_cast<std::uint64_t>(call_.shape.max_tokens * call_.shape.top_k));
      here_[static_cast<std::size_t>(rank)] = 1;
    }
    for (std::int64_t token = 0; token < ids_.num_tokens(); ++token) {
      sums_ ? add_answers(token) : exact_ ? add_exactly(token) : add_choices(token);
    }
    end_late();
  }

 private:
  std::uint16_t* out(std::int64_t token) const { return call_.x.as<std::uint16_t>() + token * hidden_; }
  bool counts(const ChoiceTable::Choice& choice) const {
    return choice.rank >= 0 && here_[static_cast<std::size_t>(choice.rank)] != 0;
  }
  const std::byte* slot(int rank, std::int64_t token, int index) const {
    const std::uint64_t at =
        static_cast<std::uint64_t>(token) * layout_.rows_per_token + static_cast<std::uint64_t>(index);
    return region(me(), rank) + layout_.rows + at * layout_.row_stride;
  }

  void add_up(std::int64_t token) {
    simd::SumRows sum;
    sum.dtype = DType::kBF16;
    sum.out = out(token);
    sum.rows = rows_.data();
    sum.num_rows = static_cast<int>(rows_.size());
    sum.hidden = hidden_;
    kernels_.sum_rows(sum);
  }

  void add_answers(std::int64_t token) {
    rows_.clear();
    const ChoiceTable::Choice* const choices = table_.of(token);
    for (int rank = 0; rank < ranks(); ++rank) {
      const bool hosts = std::any_of(choices, choices + table_.top_k,
                                     [&](const auto& one) { return one.rank == rank && counts(one); });
      if (hosts) rows_.push_back(slot(rank, token, 0));
    }
    add_up(token);
  }

  /// A choice's row as the arithmetic sees it.
  const void* row_of(std::int64_t token, int at) {
    const ChoiceTable::Choice& choice = table_.of(token)[at];
    const std::byte* const wire = slot(choice.rank, token, choice.index);
    if (!logfmt_) return wire;
    float* const row = decoded_.data() + at * hidden_;
    kernels_.logfmt_decode(reinterpret_cast<const std::uint8_t*>(wire), hidden_, row);
    return row;
  }

  /// fma over the token's choices at `rank` (-1 = all ranks), in top-k order.
  void weigh(std::int64_t token, int rank, std::uint16_t* to) {
    terms_.clear();
    weights_.clear();
    const float* const weights = call_.routing.weights.as<const float>() + token * table_.top_k;
    for (int at = 0; at < table_.top_k; ++at) {
      const ChoiceTable::Choice& choice = table_.of(token)[at];
      if (!counts(choice) || (rank >= 0 && choice.rank != rank)) continue;
      terms_.push_back(row_of(token, at));
      weights_.push_back(weights[at]);
    }
    simd::WeightedSum sum;
    sum.row_dtype = logfmt_ ? DType::kF32 : DType::kBF16;
    sum.out = to;
    sum.rows = terms_.data();
    sum.weights = weights_.data();
    sum.num_rows = static_cast<int>(terms_.size());
    sum.hidden = hidden_;
    kernels_.weighted_sum(sum);
  }

  void add_exactly(std::int64_t token) { weigh(token, -1, out(token)); }

  void add_choices(std::int64_t token) {
    rows_.clear();
    const ChoiceTable::Choice* const choices = table_.of(token);
    for (int rank = 0; rank < ranks(); ++rank) {
      const bool hosts = std::any_of(choices, choices + table_.top_k,
                                     [&](const auto& one) { return one.rank == rank && counts(one); });
      if (!hosts) continue;
      std::uint16_t* const partial = partial_.data() + rank * hidden_;
      weigh(token, rank, partial);
      rows_.push_back(partial);
    }
    add_up(token);
  }

  const core::ExpertIds ids_;
  const ChoiceTable table_;
  std::vector<std::uint8_t> here_;  ///< [rank] its rows have landed
  std::vector<const void*> rows_, terms_;
  std::vector<float> weights_, decoded_;
  std::vector<std::uint16_t> partial_;  ///< [rank][hidden] BF16
};

}  // namespace

void CpuBackend::low_latency_combine_send(backend::LowLatencyCall& call) {
  CombineSend(*group_, call).execute();
}

void CpuBackend::low_latency_combine_receive(backend::LowLatencyCall& call) {
  CombineReceive(*group_, call).execute();
}

}  // namespace anyep::cpu
