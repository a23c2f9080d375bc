// Whole operations of two ranks, from an event before to an event behind, slowest rank, operations queued behind each
// other, all kinds interleaved.
#include "high_throughput_bench.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <random>

#include "cuda/kernels/intranode_combine.h"
#include "cuda/kernels/intranode_dispatch.h"
#include "cuda/runtime/launch.h"
#include "high_throughput_world.h"

namespace anyep::test {
namespace {

constexpr int kRanks = 2, kTokens = 4096, kHidden = 7168, kTopK = 8, kExperts = 256, kScales = 56;
constexpr int kBatch = 10, kWarm = 3;

enum class Op {
  kBf16Cached,
  kBf16Ids,
  kBf16Fresh,
  kBf16Behind,
  kFp8Cached,
  kFp8Fresh,
  kFp8Behind,
  kPush,
  kGather,
  kNotify
};
struct Kind {
  const char* name;
  Op op;
};
constexpr Kind kKinds[] = {{"dispatch BF16, cached", Op::kBf16Cached},
                           {"dispatch BF16, cached, with ids", Op::kBf16Ids},
                           {"dispatch BF16, fresh, host waits", Op::kBf16Fresh},
                           {"dispatch BF16, fresh, back to back", Op::kBf16Behind},
                           {"dispatch FP8 + scales, cached", Op::kFp8Cached},
                           {"dispatch FP8, fresh, host waits", Op::kFp8Fresh},
                           {"dispatch FP8, fresh, back to back", Op::kFp8Behind},
                           {"combine, push", Op::kPush},
                           {"combine, gather", Op::kGather},
                           {"notify", Op::kNotify}};

struct Buffers {
  std::byte *x, *scales, *ids, *weights, *y, *out;
  std::byte *rows, *row_scales, *row_ids, *row_weights, *source, *heap_y;
  std::int32_t *place, *before, *rows_until, *tokens, *partial, *final_place;
  std::vector<cudaEvent_t> from, until;
};

class Bench {
 public:
  Bench() : world_(kRanks, budget(), std::size_t{1} << 30, 2'000'000'000), buffers_(kRanks) {
    world_.each([&](int r) {
      cuda::load_kernels();
      fill(r);
    });
  }

  void run(bool combine) {
    const int sms[] = {8, 16, 24};
    std::map<std::pair<int, int>, std::vector<float>> times;
    for (int round = 0; round < 7; ++round) {
      for (const int num_sms : sms) {
        batch({"notify", Op::kNotify}, num_sms, nullptr);  // places for so many ranges
        for (std::size_t kind = 0; kind < std::size(kKinds); ++kind) {
          const Op op = kKinds[kind].op;
          if (!combine && (op == Op::kPush || op == Op::kGather)) continue;
          std::vector<float>& us = times[{static_cast<int>(kind), num_sms}];
          batch(kKinds[kind], num_sms, round > 0 ? &us : nullptr);
        }
      }
    }
    std::printf("median us of the slowest rank (least .. p90), SMs 8, 16, 24\n");
    for (std::size_t kind = 0; kind < std::size(kKinds); ++kind) {
      std::printf("%-36s", kKinds[kind].name);
      for (const int num_sms : sms) {
        std::vector<float>& us = times[{static_cast<int>(kind), num_sms}];
        if (us.empty()) continue;
        std::sort(us.begin(), us.end());
        std::printf(" | %6.1f (%6.1f .. %6.1f)", us[us.size() / 2], us[0], us[us.size() * 9 / 10]);
      }
      std::printf("\n");
    }
    if (!world_.fault().empty()) std::printf("FAULT %s\n", world_.fault().c_str());
    std::fflush(stdout);
  }

 private:
  static Budget budget() {
    Budget budget;
    budget.rows_bytes = std::int64_t{5} << 28;
    budget.max_experts = kExperts;
    return budget;
  }
  Rank& rank(int r) { return world_.ranks[static_cast<std::size_t>(r)]; }

  void fill(int r) {
    Buffers& b = buffers_[static_cast<std::size_t>(r)];
    Arena &arena = rank(r).arena, &heap = rank(r).heap;
    constexpr std::size_t kRowBytes = kHidden * 2, kRoom = kRanks * kTokens;
    std::mt19937_64 random(static_cast<std::uint64_t>(r) + 1);
    std::vector<std::uint16_t> data(kRoom * kHidden);
    for (std::uint16_t& value : data) value = static_cast<std::uint16_t>(random() % 0x4000 + 0x3000);
    const auto put = [](std::byte* at, const void* from, std::size_t bytes) {
      check(cudaMemcpy(at, from, bytes, cudaMemcpyHostToDevice), "fill");
    };
    b.x = arena.take(kTokens * kRowBytes);
    b.y = arena.take(kRoom * kRowBytes);
    b.out = arena.take(kTokens * kRowBytes);
    b.heap_y = heap.take(kRoom * kRowBytes);
    put(b.x, data.data(), kTokens * kRowBytes);
    put(b.y, data.data(), kRoom * kRowBytes);
    put(b.heap_y, data.data(), kRoom * kRowBytes);
    b.scales = arena.take(kTokens * kScales * 4);
    put(b.scales, data.data(), kTokens * kScales * 4);
    std::vector<std::int64_t> ids, order(kExperts);
    for (int i = 0; i < kExperts; ++i) order[static_cast<std::size_t>(i)] = i;
    for (int token = 0; token < kTokens; ++token) {
      for (std::size_t i = 0; i < kTopK; ++i) {
        std::swap(order[i], order[i + random() % (kExperts - i)]);
        ids.push_back(order[i]);
      }
    }
    b.ids = arena.take(ids.size() * 8);
    put(b.ids, ids.data(), ids.size() * 8);
    b.weights = arena.take(ids.size() * 4);
    put(b.weights, data.data(), ids.size() * 4);
    b.rows = heap.take(kRoom * kRowBytes);
    b.row_scales = heap.take(kRoom * kScales * 4);
    b.row_ids = heap.take(kRoom * kTopK * 8);
    b.row_weights = heap.take(kRoom * kTopK * 4);
    b.source = heap.take(kRoom * 4);
    b.place = arena.array<std::int32_t>(kTokens * kRanks);
    b.final_place = arena.array<std::int32_t>(kTokens * kRanks);
    b.before = arena.array<std::int32_t>(256 * kRanks);
    b.rows_until = arena.array<std::int32_t>(kRanks);
    b.tokens = arena.array<std::int32_t>(kRanks);
    b.partial = arena.array<std::int32_t>(256 * (kExperts + kRanks));
    b.from.resize(kBatch);
    b.until.resize(kBatch);
    for (int i = 0; i < kBatch; ++i) {
      check(cudaEventCreate(&b.from[static_cast<std::size_t>(i)]), "event");
      check(cudaEventCreate(&b.until[static_cast<std::size_t>(i)]), "event");
    }
    check(cudaDeviceSynchronize(), "fill");
  }

  void batch(const Kind& kind, int num_sms, std::vector<float>* times) {
    world_.each([&](int r) {
      Buffers& b = buffers_[static_cast<std::size_t>(r)];
      for (std::size_t i = 0; i < kBatch; ++i) {
        check(cudaEventRecord(b.from[i], rank(r).stream), "event");
        if (!launch(kind.op, r, num_sms, static_cast<int>(i))) return;
        check(cudaEventRecord(b.until[i], rank(r).stream), "event");
      }
      check(cudaStreamSynchronize(rank(r).stream), "batch");
    });
    for (std::size_t i = kWarm; times != nullptr && i < kBatch; ++i) {
      float slowest = 0;
      for (Buffers& b : buffers_) {
        float ms = 0;
        check(cudaEventElapsedTime(&ms, b.from[i], b.until[i]), "elapsed");
        slowest = std::max(slowest, ms * 1000);
      }
      times->push_back(slowest);
    }
  }

  bool launch(Op op, int r, int num_sms, int i) {
    const bool fp8 = op == Op::kFp8Cached || op == Op::kFp8Fresh || op == Op::kFp8Behind;
    const bool waits = op == Op::kBf16Fresh || op == Op::kFp8Fresh;
    const bool fresh = waits || op == Op::kBf16Behind || op == Op::kFp8Behind;
    if (op == Op::kPush || op == Op::kGather) {
      launch_sums(r, num_sms, op == Op::kGather);
      return true;
    }
    cuda::CountsPage& page = rank(r).page[i % World::kPages];
    if (fresh || op == Op::kNotify) {
      page.word = 0;
      launch_notify(r, num_sms, page, fresh && !waits);
      if (waits && !wait_for_page(rank(r), page)) return false;
    }
    if (op != Op::kNotify) launch_rows(r, num_sms, fp8, fresh || op == Op::kBf16Ids, !waits && fresh);
    if (fresh && !waits) return wait_for_page(rank(r), page);
    return true;
  }

  static int ranges(int num_sms) { return cuda::notify_ranges(kTokens, num_sms); }
  static int per_range(int num_sms) { return (kTokens + ranges(num_sms) - 1) / ranges(num_sms); }

  void launch_notify(int r, int num_sms, cuda::CountsPage& page, bool dispatch_behind) {
    Buffers& b = buffers_[static_cast<std::size_t>(r)];
    cuda::NotifyParams p;
    p.team = world_.team(r, protocol::make_code(1, 1));
    p.experts = b.ids;
    p.token_stride = kTopK;
    p.choice_stride = 1;
    p.num_tokens = kTokens;
    p.top_k = kTopK;
    p.num_experts = kExperts;
    p.place = b.place;
    p.before = b.before;
    p.num_ranges = ranges(num_sms);
    p.tokens_per_range = per_range(num_sms);
    p.rows_until = b.rows_until;
    p.tokens = b.tokens;
    p.partial = b.partial;
    p.page = &page;
    p.dispatch_behind = dispatch_behind;
    if (dispatch_behind) ++rank(r).notifies_with_dispatch;
    cuda::launch_notify(p, rank(r).stream);
  }

  void launch_rows(int r, int num_sms, bool fp8, bool fresh, bool behind) {
    Buffers& b = buffers_[static_cast<std::size_t>(r)];
    cuda::DispatchParams p;
    p.team = world_.team(r, protocol::make_code(2, fp8 ? 2 : 1));
    p.places = {b.place, b.before, per_range(num_sms), kTokens};
    p.x = b.x;
    p.row_bytes = fp8 ? kHidden : kHidden * 2;
    p.x_row_stride = p.row_bytes;
    const auto offset = [&](const std::byte* at) { return static_cast<std::uint64_t>(at - rank(r).window); };
    constexpr std::uint64_t kNone = cuda::Grant::kNone;
    p.grant = {offset(b.rows), kNone, kNone, kNone, kNone, {kNone, kNone, kNone, kNone}, kRanks * kTokens, 1};
    if (fp8) {
      p.scales = {b.scales, kScales * 4, 4, 4, kScales};
      p.grant.scales = offset(b.row_scales);
    }
    if (fresh) {
      p.experts = {b.ids, kTopK * 8, 8, 8, kTopK};
      p.weights = {b.weights, kTopK * 4, 4, 4, kTopK};
      p.grant.experts = offset(b.row_ids);
      p.grant.weights = offset(b.row_weights);
      p.grant.source = offset(b.source);
      p.final_place = b.final_place;
      p.mark_rest_until = behind ? kRanks * kTokens : 0;
    }
    p.num_experts = kExperts;
    p.rows_until = b.rows_until;
    if (behind) p.behind_notify = rank(r).notifies_with_dispatch;
    cuda::launch_dispatch(p, num_sms, rank(r).stream);
  }

  void launch_sums(int r, int num_sms, bool gather) {
    Buffers& b = buffers_[static_cast<std::size_t>(r)];
    cuda::CombineParams p;
    p.team = world_.team(r, protocol::make_code(3, 1));
    p.dtype = DType::kBF16;
    p.hidden = kHidden;
    p.x = gather ? b.heap_y : b.y;
    p.x_row_stride = kHidden * 2;
    p.num_rows = kRanks * kTokens;
    if (gather) p.x_in_window = static_cast<std::uint64_t>(b.heap_y - rank(r).window);
    p.rows_until = b.rows_until;
    p.places = {b.place, b.before, per_range(num_sms), kTokens};
    p.out = b.out;
    p.out_row_stride = kHidden * 2;
    cuda::launch_combine(p, num_sms, rank(r).stream);
  }

  World world_;
  std::vector<Buffers> buffers_;
};

}  // namespace

void run_bench(bool combine) {
  Bench().run(combine);
}

}  // namespace anyep::test
