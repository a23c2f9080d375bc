// Runs one case in a world: uploads, launches two rounds back to back, compares everything bit for bit.
#pragma once

#include <algorithm>
#include <sstream>

#include "cuda/kernels/intranode_combine.h"
#include "cuda/kernels/intranode_dispatch.h"
#include "high_throughput_case.h"
#include "high_throughput_world.h"

namespace anyep::test {

inline constexpr int kRounds = 2;
inline constexpr std::byte kPoison{0xEE};

/// Device arrays of one rank in one round of outputs.
struct RoundBuffers {
  std::byte *x = nullptr, *scales = nullptr, *ids = nullptr, *weights = nullptr, *source = nullptr, *extra = nullptr;
  std::int32_t* final_place = nullptr;
  std::byte *sums = nullptr, *sum_weights = nullptr;
  std::size_t rows = 0;  ///< allocated
  std::int64_t room = 0;
};

struct RankBuffers {
  std::byte *ids = nullptr, *weights = nullptr, *x = nullptr, *scales = nullptr, *extra = nullptr, *in_rank = nullptr;
  std::int64_t id_stride = 0, x_stride = 0, y_stride = 0;
  std::int32_t *place = nullptr, *before = nullptr, *rows_until = nullptr, *tokens = nullptr, *partial = nullptr,
               *source = nullptr;
  std::byte *y = nullptr, *y_weights = nullptr, *bias[2] = {};
  int ranges = 1;
  RoundBuffers round[kRounds];
};

class Run {
 public:
  Run(World& world, const Case& c)
      : world_(world), c_(c), all_(make_case(c)), buffers_(static_cast<std::size_t>(c.num_ranks)) {
    most_tokens_ = *std::max_element(c.tokens.begin(), c.tokens.end());
  }

  /// Text of the first difference; empty = all right.
  std::string execute(bool combine) {
    world_.each([&](int r) { upload(r); });
    std::barrier start(world_.size());
    world_.each([&](int r) {
      start.arrive_and_wait();
      std::mt19937_64 random(c_.seed + static_cast<std::uint64_t>(r));
      for (int round = 0; round < kRounds; ++round) {
        if (random() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 500));  // a late rank
        if (!launch_dispatch_round(r, round)) return;
        if (random() % 8 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
        if (combine) launch_combine_round(r, round);
      }
    });
    world_.sync_all();
    if (const std::string fault = world_.fault(); !fault.empty()) return fault;
    for (int r = 0; r < world_.size(); ++r) {
      check(cudaSetDevice(rank(r).device), "device");
      for (int round = 0; round < kRounds; ++round) {
        std::string difference = compare(r, round, combine);
        if (!difference.empty()) {
          return "rank " + std::to_string(r) + " round " + std::to_string(round) + ": " + difference;
        }
      }
    }
    return {};
  }

 private:
  Rank& rank(int r) { return world_.ranks[static_cast<std::size_t>(r)]; }
  RankBuffers& buffers(int r) { return buffers_[static_cast<std::size_t>(r)]; }
  const RankCase& expected(int r) const { return all_[static_cast<std::size_t>(r)]; }
  int tokens(int r) const { return c_.tokens[static_cast<std::size_t>(r)]; }

  template <class T>
  std::byte* put(Arena& arena, const std::vector<T>& values) {
    std::byte* const at = arena.take(values.size() * sizeof(T) + 16);
    if (!values.empty()) check(cudaMemcpy(at, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "put");
    return at;
  }
  std::byte* put_rows(Arena& arena, const std::vector<std::byte>& rows, std::int64_t stride, std::size_t beside) {
    const std::size_t count = rows.size() / c_.row_bytes();
    std::byte* const at = arena.take(count * static_cast<std::size_t>(stride) + 16, beside);
    if (count != 0) {
      check(cudaMemcpy2D(at, static_cast<std::size_t>(stride), rows.data(), c_.row_bytes(), c_.row_bytes(), count,
                         cudaMemcpyHostToDevice),
            "rows");
    }
    return at;
  }

  void upload(int r) {
    const RankCase& in = expected(r);
    RankBuffers& b = buffers(r);
    Arena &arena = rank(r).arena, &heap = rank(r).heap;
    arena.reset();
    heap.reset();
    b.id_stride = c_.top_k + static_cast<std::int64_t>(c_.seed % 3);
    std::vector<std::int64_t> wide(static_cast<std::size_t>(tokens(r) * b.id_stride));
    std::vector<std::int32_t> narrow(wide.size());
    for (int token = 0; token < tokens(r); ++token) {
      for (int choice = 0; choice < c_.top_k; ++choice) {
        const std::int64_t id = in.ids[static_cast<std::size_t>(token * c_.top_k + choice)];
        wide[static_cast<std::size_t>(token * b.id_stride + choice)] = id;
        narrow[static_cast<std::size_t>(token * b.id_stride + choice)] = static_cast<std::int32_t>(id);
      }
    }
    b.ids = c_.wide_in ? put(arena, wide) : put(arena, narrow);
    b.weights = put(arena, in.weights);
    b.in_rank = put(arena, in.in_rank);
    std::vector<std::uint32_t> scales = in.scales;
    if (c_.by_columns) {
      for (int token = 0; token < tokens(r); ++token) {
        for (int s = 0; s < c_.num_scales; ++s) {
          scales[static_cast<std::size_t>(s * tokens(r) + token)] =
              in.scales[static_cast<std::size_t>(token * c_.num_scales + s)];
        }
      }
    }
    b.scales = put(arena, scales);
    b.extra = put(arena, in.extra);
    b.x_stride = c_.row_bytes() + c_.x_pad;
    b.y_stride = c_.row_bytes() + c_.x_pad;
    b.x = put_rows(arena, in.x, b.x_stride, static_cast<std::size_t>(c_.x_beside));
    const bool gather = c_.gather[r];
    if (gather) b.y_stride = c_.row_bytes();
    b.y = put_rows(gather ? heap : arena, in.y, b.y_stride, gather ? 0 : static_cast<std::size_t>(c_.x_beside));
    b.y_weights = put(gather ? heap : arena, in.y_weights);
    for (int bias = 0; bias < c_.num_bias; ++bias) b.bias[bias] = put_rows(arena, in.bias[bias], c_.row_bytes(), 0);
    b.source = reinterpret_cast<std::int32_t*>(put(arena, in.source));
    b.ranges = cuda::notify_ranges(tokens(r), c_.num_sms);
    b.place = arena.array<std::int32_t>(static_cast<std::size_t>(tokens(r) * c_.num_ranks + 1));
    b.before = arena.array<std::int32_t>(static_cast<std::size_t>(b.ranges * c_.num_ranks));
    b.rows_until = arena.array<std::int32_t>(8);
    b.tokens = arena.array<std::int32_t>(8);
    b.partial = arena.array<std::int32_t>(static_cast<std::size_t>(b.ranges * (c_.num_experts + c_.num_ranks)));
    for (RoundBuffers& round : b.round) take_outputs(r, round);
    check(cudaDeviceSynchronize(), "upload");
  }

  void take_outputs(int r, RoundBuffers& round) {
    Arena &arena = rank(r).arena, &heap = rank(r).heap;
    const auto rows = static_cast<std::size_t>(expected(r).rows());
    round.room = c_.room == 1 ? std::int64_t{c_.num_ranks} * most_tokens_ : static_cast<std::int64_t>(rows);
    if (c_.room == 2) round.room = static_cast<std::int64_t>(rows) / 2;
    round.rows = std::max(rows, static_cast<std::size_t>(round.room)) + 2;
    round.x = heap.take(round.rows * c_.row_bytes(), c_.seed % 11 == 5 ? 4 : 0);
    round.scales = heap.take(round.rows * static_cast<std::size_t>(c_.num_scales) * 4);
    round.ids = heap.take(round.rows * static_cast<std::size_t>(c_.top_k) * 8);
    round.weights = heap.take(round.rows * static_cast<std::size_t>(c_.top_k) * 4);
    round.source = heap.take(round.rows * 4);
    round.extra = heap.take(round.rows * static_cast<std::size_t>(c_.extra_elements) * 2);
    round.final_place = arena.array<std::int32_t>(static_cast<std::size_t>(tokens(r) * c_.num_ranks + 1));
    round.sums =
        arena.take(static_cast<std::size_t>(tokens(r)) * c_.row_bytes() + 16, static_cast<std::size_t>(c_.x_beside));
    round.sum_weights = arena.take(static_cast<std::size_t>(tokens(r) * c_.num_weights) * 4 + 16);
  }

  void poison(int r, const void* at, std::size_t bytes) {
    check(cudaMemsetAsync(const_cast<void*>(at), static_cast<int>(kPoison), bytes, rank(r).stream), "poison");
  }

  cuda::Team team(int r, unsigned kind) {
    return world_.team(r, protocol::make_code(kind, protocol::digest(protocol::kDigestSeed, c_.seed)));
  }

  bool launch_dispatch_round(int r, int round) {
    RankBuffers& b = buffers(r);
    RoundBuffers& out = b.round[round];
    cudaStream_t stream = rank(r).stream;
    poison(r, out.x, out.rows * c_.row_bytes());
    poison(r, out.scales, out.rows * static_cast<std::size_t>(c_.num_scales) * 4);
    poison(r, out.ids, out.rows * static_cast<std::size_t>(c_.top_k) * 8);
    poison(r, out.weights, out.rows * static_cast<std::size_t>(c_.top_k) * 4);
    poison(r, out.source, out.rows * 4);
    poison(r, out.extra, out.rows * static_cast<std::size_t>(c_.extra_elements) * 2);
    poison(r, b.place, static_cast<std::size_t>(tokens(r) * c_.num_ranks + 1) * 4);
    poison(r, b.before, static_cast<std::size_t>(b.ranges * c_.num_ranks) * 4);
    cuda::CountsPage& page = rank(r).page[round];
    page.word = 0;

    cuda::NotifyParams notify;
    notify.team = team(r, 1);
    notify.experts = b.ids;
    notify.wide_ids = c_.wide_in;
    notify.token_stride = b.id_stride;
    notify.choice_stride = 1;
    if (c_.given_ranks) notify.in_rank = reinterpret_cast<const std::uint8_t*>(b.in_rank);
    notify.num_tokens = tokens(r);
    notify.top_k = c_.top_k;
    notify.num_experts = c_.num_experts;
    notify.place = b.place;
    notify.before = b.before;
    notify.num_ranges = b.ranges;
    notify.tokens_per_range = std::max(1, (tokens(r) + b.ranges - 1) / b.ranges);
    notify.rows_until = b.rows_until;
    notify.tokens = b.tokens;
    notify.partial = b.partial;
    notify.page = &page;
    notify.dispatch_behind = c_.room == 1 && c_.num_ranks <= 2 && c_.seed % 2 == 0;
    if (notify.dispatch_behind) ++world_.ranks[static_cast<std::size_t>(r)].notifies_with_dispatch;
    cuda::launch_notify(notify, stream);
    if (c_.room == 0 && !wait_for_page(rank(r), page)) return false;

    cuda::DispatchParams dispatch;
    dispatch.team = team(r, 2);
    dispatch.places = {b.place, b.before, notify.tokens_per_range, tokens(r)};
    dispatch.x = b.x;
    dispatch.x_row_stride = b.x_stride;
    dispatch.row_bytes = c_.row_bytes();
    const auto offset = [&](const std::byte* at) { return static_cast<std::uint64_t>(at - rank(r).window); };
    dispatch.grant = {
        offset(out.x), cuda::Grant::kNone, cuda::Grant::kNone, cuda::Grant::kNone, offset(out.source), {}, 0, 0};
    for (std::uint64_t& extra : dispatch.grant.extra) extra = cuda::Grant::kNone;
    dispatch.grant.room = static_cast<std::uint64_t>(out.room);
    if (c_.num_scales > 0) {
      dispatch.grant.scales = offset(out.scales);
      dispatch.scales = {b.scales, c_.by_columns ? 4 : c_.num_scales * 4, c_.by_columns ? tokens(r) * 4 : 4, 4,
                         static_cast<std::uint32_t>(c_.num_scales)};
    }
    if (c_.extra_elements > 0) {
      dispatch.grant.extra[1] = offset(out.extra);
      dispatch.extra[1] = {b.extra, c_.extra_elements * 2, 2, 2, static_cast<std::uint32_t>(c_.extra_elements)};
    }
    if (c_.with_ids) {
      const std::uint32_t id_bytes = c_.wide_in ? 8 : 4, top_k = static_cast<std::uint32_t>(c_.top_k);
      dispatch.grant.experts = offset(out.ids);
      dispatch.grant.weights = offset(out.weights);
      dispatch.experts = {b.ids, b.id_stride * id_bytes, id_bytes, id_bytes, top_k};
      dispatch.weights = {b.weights, c_.top_k * 4, 4, 4, top_k};
    }
    dispatch.num_experts = c_.num_experts;
    dispatch.grant.wide_ids = c_.wide_out ? 1 : 0;
    dispatch.final_place = out.final_place;
    dispatch.mark_rest_until = c_.room == 1 ? out.room : 0;
    dispatch.rows_until = b.rows_until;
    if (notify.dispatch_behind) {
      dispatch.behind_notify = world_.ranks[static_cast<std::size_t>(r)].notifies_with_dispatch;
    }
    const std::int64_t rows = expected(r).rows();
    const std::uint64_t way = (c_.seed + static_cast<std::uint64_t>(r)) % 3;  // another at each rank
    if (way == 0 && rows > 0) {  // a launch that lacks room for one row is as if it had not been made
      cuda::DispatchParams guess = dispatch;
      guess.whole_or_nothing = true;
      guess.grant.room = static_cast<std::uint64_t>(rows - 1);
      guess.mark_rest_until = 0;
      cuda::launch_dispatch(guess, c_.num_sms, stream);
      dispatch.behind_notify = 0;
    }
    dispatch.whole_or_nothing = way == 1 && c_.room != 2;
    cuda::launch_dispatch(dispatch, c_.num_sms, stream);
    return true;
  }

  void launch_combine_round(int r, int round) {
    RankBuffers& b = buffers(r);
    RoundBuffers& out = b.round[round];
    poison(r, out.sums, static_cast<std::size_t>(tokens(r)) * c_.row_bytes());
    poison(r, out.sum_weights, static_cast<std::size_t>(tokens(r) * c_.num_weights) * 4);
    cuda::CombineParams combine;
    combine.team = team(r, 3);
    combine.dtype = c_.dtype;
    combine.hidden = c_.hidden;
    combine.x = b.y;
    combine.x_row_stride = b.y_stride;
    combine.num_rows = expected(r).rows();
    if (c_.gather[r]) combine.x_in_window = static_cast<std::uint64_t>(b.y - rank(r).window);
    if (c_.num_weights > 0) {
      combine.weights = reinterpret_cast<const float*>(b.y_weights);
      if (c_.gather[r]) combine.weights_in_window = static_cast<std::uint64_t>(b.y_weights - rank(r).window);
      combine.out_weights = reinterpret_cast<float*>(out.sum_weights);
    }
    combine.num_weights = c_.num_weights;
    combine.rows_until = b.rows_until;
    combine.tokens = b.tokens;
    combine.source = b.source;
    combine.places = {b.place, b.before, std::max(1, (tokens(r) + b.ranges - 1) / b.ranges), tokens(r)};
    for (int bias = 0; bias < c_.num_bias; ++bias) {
      combine.bias[bias] = b.bias[bias];
      combine.bias_row_stride[bias] = c_.row_bytes();
    }
    combine.out = out.sums;
    combine.out_row_stride = c_.row_bytes();
    for (std::int64_t first = 0; first == 0 || first < most_tokens_; first += c_.tokens_per_turn) {
      combine.first_token = first;
      combine.last_token = c_.tokens_per_turn == INT64_MAX ? INT64_MAX : first + c_.tokens_per_turn;
      if (first > 0 && (c_.seed + static_cast<std::uint64_t>(r)) % 2 == 0) {  // a rank that does not know how many
        cuda::launch_further_turns(combine, c_.num_sms, rank(r).stream);
        break;
      }
      cuda::launch_combine(combine, c_.num_sms, rank(r).stream);
      if (c_.tokens_per_turn == INT64_MAX) break;
    }
  }

  template <class T>
  std::vector<T> get(const void* at, std::size_t count) {
    std::vector<T> values(count);
    if (count != 0) check(cudaMemcpy(values.data(), at, count * sizeof(T), cudaMemcpyDeviceToHost), "get");
    return values;
  }

  std::string compare(int r, int round, bool combine) {
    RankBuffers& b = buffers(r);
    const RoundBuffers& out = b.round[round];
    const RankCase& want = expected(r);
    const cuda::CountsPage& page = rank(r).page[round];
    const auto ranks = static_cast<std::size_t>(c_.num_ranks);
    if (!std::equal(want.rows_until.begin(), want.rows_until.end(), page.rows_until)) return "rows_until of the page";
    if (get<std::int32_t>(b.rows_until, ranks) != want.rows_until) return "rows_until";
    if (get<std::int32_t>(b.tokens, ranks) != c_.tokens) return "tokens";
    if (!std::equal(want.pairs.begin(), want.pairs.end(), page.pairs)) return "pairs";
    for (std::size_t at = 0; at < ranks; ++at) {
      if (page.rows_of[at] != expected(static_cast<int>(at)).rows()) return "rows_of";
    }
    if (get<std::int32_t>(out.final_place, want.place.size()) != want.place) return "final places";
    std::string text = round == 0 ? compare_local(r) : std::string();
    if (text.empty()) text = compare_rows(r, out);
    if (text.empty() && combine) text = compare_sums(r, out);
    return text;
  }

  /// What needs no peers: the layout, final places, copies of any alignment.
  std::string compare_local(int r) {
    RankBuffers& b = buffers(r);
    const RankCase& want = expected(r);
    const auto ranks = static_cast<std::size_t>(c_.num_ranks), experts = static_cast<std::size_t>(c_.num_experts);
    Arena& arena = rank(r).arena;
    cuda::LayoutParams layout{b.ids,
                              c_.wide_in,
                              b.id_stride,
                              1,
                              tokens(r),
                              c_.top_k,
                              c_.num_experts,
                              c_.num_ranks,
                              arena.array<std::int32_t>(ranks),
                              arena.array<std::int32_t>(experts),
                              arena.array<std::uint8_t>(want.place.size() + 1)};
    auto* const places = arena.array<std::int32_t>(want.place.size() + 1);
    std::byte* const copy = arena.take(b.round[1].rows * c_.row_bytes() + 64, c_.seed % 5);
    cuda::launch_layout(layout, c_.num_sms, rank(r).stream);
    cuda::launch_final_places(b.place, b.before, std::max(1, (tokens(r) + b.ranges - 1) / b.ranges), tokens(r),
                              c_.num_ranks, places, rank(r).stream);
    cuda::CopyRowsParams copies;
    copies.field[0] = {b.round[1].x, copy, c_.row_bytes(), c_.row_bytes(), c_.row_bytes()};
    copies.num_fields = 1;
    copies.num_rows = static_cast<std::int64_t>(b.round[1].rows);
    cuda::launch_copy_rows(copies, c_.num_sms, rank(r).stream);
    check(cudaStreamSynchronize(rank(r).stream), "local");
    if (get<std::int32_t>(places, want.place.size()) != want.place) return "final places of a launch";
    const std::size_t bytes = b.round[1].rows * c_.row_bytes();
    const std::vector<std::byte> copied = get<std::byte>(copy, bytes), original = get<std::byte>(b.round[1].x, bytes);
    if (!std::equal(copied.begin(), copied.end(), original.begin(), original.end())) return "copied rows";
    if (c_.given_ranks) return {};
    std::vector<std::int32_t> per_rank(ranks), per_expert(experts);
    for (std::size_t at = 0; at < want.in_rank.size(); ++at) per_rank[at % ranks] += want.in_rank[at];
    for (const std::int64_t id : want.ids) {
      if (id >= 0 && id < c_.num_experts) ++per_expert[static_cast<std::size_t>(id)];
    }
    if (get<std::int32_t>(layout.tokens_per_rank, ranks) != per_rank) return "tokens per rank";
    if (get<std::int32_t>(layout.pairs_per_expert, experts) != per_expert) return "pairs per expert";
    if (get<std::uint8_t>(layout.token_in_rank, want.in_rank.size()) != want.in_rank) return "token in rank";
    return {};
  }

  std::string compare_rows(int r, const RoundBuffers& out) {
    const RankCase& want = expected(r);
    const auto there = static_cast<std::size_t>(std::min<std::int64_t>(want.rows(), out.room));
    const std::size_t row_bytes = c_.row_bytes(), top_k = static_cast<std::size_t>(c_.top_k);
    const auto x = get<std::byte>(out.x, out.rows * row_bytes);
    const auto source = get<std::int32_t>(out.source, out.rows);
    const auto scales = get<std::uint32_t>(out.scales, out.rows * static_cast<std::size_t>(c_.num_scales));
    const auto extra = get<std::uint16_t>(out.extra, out.rows * static_cast<std::size_t>(c_.extra_elements));
    const auto weights = get<float>(out.weights, out.rows * top_k);
    const auto wide = get<std::int64_t>(out.ids, out.rows * top_k);
    const auto* const narrow = reinterpret_cast<const std::int32_t*>(wide.data());
    const core::ExpertBlock block = core::expert_block(c_.num_experts, c_.num_ranks, r);
    const auto fail = [](const char* what, std::size_t row) { return what + (" of row " + std::to_string(row)); };
    for (std::size_t row = 0; row < there; ++row) {
      const RankCase& from = expected(want.from[row]);
      const auto token = static_cast<std::size_t>(want.source[row]);
      if (std::memcmp(&x[row * row_bytes], &from.x[token * row_bytes], row_bytes) != 0) return fail("x", row);
      if (source[row] != want.source[row]) return fail("source", row);
      for (std::size_t s = 0, n = static_cast<std::size_t>(c_.num_scales); s < n; ++s) {
        if (scales[row * n + s] != from.scales[token * n + s]) return fail("scales", row);
      }
      for (std::size_t s = 0, n = static_cast<std::size_t>(c_.extra_elements); s < n; ++s) {
        if (extra[row * n + s] != from.extra[token * n + s]) return fail("extra", row);
      }
      for (std::size_t choice = 0; c_.with_ids && choice < top_k; ++choice) {
        const std::int64_t id = from.ids[token * top_k + choice];
        const bool here = id >= block.first && id < block.first + block.count;
        const std::int64_t local = here ? id - block.first : -1;
        if ((c_.wide_out ? wide[row * top_k + choice] : narrow[row * top_k + choice]) != local) return fail("id", row);
        if (weights[row * top_k + choice] != (here ? from.weights[token * top_k + choice] : 0.0f))
          return fail("weight", row);
      }
    }
    for (std::size_t at = there * row_bytes; at < x.size(); ++at) {
      if (x[at] != kPoison) return fail("something behind x", at / row_bytes);
    }
    const auto room = static_cast<std::size_t>(out.room);
    for (std::size_t at = there * top_k; c_.with_ids && c_.room == 1 && at < room * top_k; ++at) {
      if ((c_.wide_out ? wide[at] : narrow[at]) != -1) return fail("rest id", at / top_k);
    }
    return {};
  }

  std::string compare_sums(int r, const RoundBuffers& out) {
    std::vector<float> weights;
    const std::vector<std::byte> want = sums_of(c_, all_, r, weights);
    const auto sums = get<std::byte>(out.sums, want.size());
    for (std::size_t at = 0; at < want.size(); ++at) {
      if (sums[at] != want[at]) {
        std::ostringstream text;
        text << "sum of token " << at / c_.row_bytes() << " byte " << at % c_.row_bytes() << " got "
             << static_cast<int>(sums[at]) << " want " << static_cast<int>(want[at]);
        return text.str();
      }
    }
    if (get<float>(out.sum_weights, weights.size()) != weights) return "sums of weights";
    return {};
  }

  World& world_;
  const Case& c_;
  const std::vector<RankCase> all_;
  std::vector<RankBuffers> buffers_;
  int most_tokens_ = 0;
};

}  // namespace anyep::test
