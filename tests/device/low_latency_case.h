// Random pairs of low-latency ops, run on all ranks and compared with the reference, bit for bit.
#pragma once

#include <cstdint>
#include <string>

#include "core/low_latency.h"
#include "low_latency_pair.h"
#include "low_latency_world.h"
#include "reference/low_latency.h"

namespace anyep::test {

struct LingerParams {
  std::uint64_t ns;
};
static __global__ void linger(const __grid_constant__ LingerParams p) {
  const std::uint64_t from = protocol::now_ns();
  while (protocol::now_ns() - from < p.ns) {
  }
}
static const cuda::Kernel<LingerParams> kLinger(linger, "linger");

/// Host and device memory of one rank for one pair.
struct Buffers {
  static constexpr std::size_t kBytes = std::size_t{192} << 20;
  std::byte* base = nullptr;
  std::size_t used = 0;
  template <class T>
  T* take(std::size_t count) {
    T* const at = reinterpret_cast<T*>(base + used);
    used = (used + count * sizeof(T) + 255) / 256 * 256;
    if (used > kBytes) {
      std::printf("test: buffers too small\n");
      _exit(5);
    }
    return at;
  }
};

struct Run {
  Pair pair;
  int max_sms = 0;
  std::vector<std::vector<std::uint16_t>> x;
  std::vector<std::vector<std::int64_t>> ids;
  std::vector<std::vector<std::int32_t>> narrow;
  std::vector<std::vector<float>> weights;
  std::vector<std::vector<std::uint16_t>> y;  ///< slabs that combine takes
  std::vector<Routing> routing;
  std::vector<reference::Slabs> want;
  std::vector<std::vector<std::byte>> want_out;
  std::uint64_t strays = 0;
  struct Device {
    std::byte *x, *ids, *weights, *slab, *y, *out;
    std::uint32_t* scales;
    std::int32_t *counts, *source, *received, *table;
    std::int64_t* range;
    unsigned long long* waited;
    std::size_t slab_bytes, scale_words, rows;
  };
  std::vector<Device> device;
};

class Test {
 public:
  Test(World& world, std::uint64_t seed) : world_(world), random_(seed) {
    for (int i = 0; i < 2; ++i) {
      for (int r = 0; r < world.num_ranks(); ++r) {
        CHECK_CUDA(cudaSetDevice(world.at(r).device));
        Buffers buffers;
        buffers.base = device_memory<std::byte>(Buffers::kBytes);
        buffers_[i].push_back(buffers);
      }
    }
  }
  ~Test() {
    for (auto& all : buffers_) {
      for (Buffers& buffers : all) CHECK_CUDA(cudaFree(buffers.base));
    }
  }

  int below(int limit) { return static_cast<int>(random_() % static_cast<unsigned>(limit)); }
  bool chance(int percent) { return below(100) < percent; }

  /// `wide`: rows of more strips than a block has warps, and more tokens than there are chunks.
  Pair random_pair(int most_tokens, bool wide = false) {
    Pair pair;
    const int ranks = world_.num_ranks();
    Shape& shape = pair.shape;
    const int experts[] = {ranks, 3, 8, 17, 32, 64, 130};
    shape.num_experts = experts[below(7)];
    shape.top_k = 1 + below(chance(20) ? 32 : 8);
    const int hiddens[] = {16, 128, 512, 640, 1024, 1536, 2048, 2064, 4096, 7168};
    shape.hidden = hiddens[below(10)];
    shape.max_tokens = 1 + below(most_tokens);
    if (wide) {
      shape.num_experts = experts[below(3)];
      shape.top_k = 1 + below(8);
      shape.hidden = chance(50) ? 4096 : 7168;
      shape.max_tokens = ll::kMaxChunks + 1 + below(170);
    }
    while (std::max(shape.num_experts, ranks) * shape.max_tokens * shape.hidden > (std::int64_t{24} << 20))
      shape.max_tokens = (shape.max_tokens + 1) / 2;
    pair.tokens.resize(static_cast<std::size_t>(ranks));
    const int kind = below(4);
    const int same = below(static_cast<int>(shape.max_tokens) + 1);
    for (int& tokens : pair.tokens) {
      tokens = kind == 0   ? static_cast<int>(shape.max_tokens)
               : kind == 1 ? same
               : kind == 2 ? below(std::min<int>(20, static_cast<int>(shape.max_tokens)) + 1)
                           : below(static_cast<int>(shape.max_tokens) + 1);
    }
    pair.wide_ids = chance(50);
    const Wire wires[] = {Wire::kBF16, Wire::kFP8, Wire::kUE8M0};
    pair.dispatch.wire = wires[below(3)];
    pair.dispatch.round_scale = chance(30);
    pair.dispatch.hook = chance(30);
    pair.combine.hook = chance(30);
    pair.combine.exact = chance(15);
    pair.combine.find_rows = chance(30);
    pair.combine.far_slabs = chance(30);
    pair.combine.wire = shape.hidden % 128 == 0 && chance(20) ? Wire::kLogFMT : Wire::kBF16;
    const int sms[] = {0, 0, 0, 1, 3, 16};
    pair.dispatch.num_sms = sms[below(6)];
    pair.combine.num_sms = sms[below(6)];
    if (world_.num_gpus() == ranks) pair.dispatch.early = pair.combine.early = chance(40);
    return pair;
  }

  std::uint16_t random_bf16(int spread) {
    const int special = below(400);
    if (special == 0) return 0x8000;
    if (special == 1 && spread > 0) return static_cast<std::uint16_t>(random_() & 0x7f);  // denormal
    const auto sign = static_cast<std::uint16_t>(random_() & 0x8000);
    const int exponent = 120 + below(std::max(spread, 1));
    return static_cast<std::uint16_t>(sign | exponent << 7 | (random_() & 0x7f));
  }

  /// Inputs, and what the reference says.
  void prepare(Run& run, const Pair& pair, int slot) {
    const int ranks = world_.num_ranks();
    const Shape& shape = pair.shape;
    run = Run{};
    run.pair = pair;
    running() = text_of(pair);
    const auto n = static_cast<std::size_t>(ranks);
    run.x.resize(n), run.ids.resize(n), run.narrow.resize(n), run.weights.resize(n), run.y.resize(n),
        run.device.resize(n);
    std::vector<TensorView> views;
    for (int r = 0; r < ranks; ++r) {
      const auto at = static_cast<std::size_t>(r);
      const auto tokens = static_cast<std::size_t>(pair.tokens[at]), top_k = static_cast<std::size_t>(shape.top_k);
      run.x[at].resize(tokens * static_cast<std::size_t>(shape.hidden));
      // Cheap and varied: a random line, repeated with changes.
      std::uint16_t line[257];
      for (std::uint16_t& value : line) value = random_bf16(6 + below(8));
      for (std::size_t i = 0; i < run.x[at].size(); ++i)
        run.x[at][i] = static_cast<std::uint16_t>(line[i % 257] ^ (i * 2654435761u >> 27 & 7));
      run.ids[at].resize(tokens * top_k);
      run.weights[at].resize(tokens * top_k);
      const bool skewed = chance(25);
      for (std::size_t i = 0; i < run.ids[at].size(); ++i) {
        std::int64_t id = skewed ? below(std::max(1, shape.num_experts / 4)) : below(shape.num_experts);
        if (chance(5)) id = -1;
        if (chance(1)) id = chance(50) ? shape.num_experts + 5 : (pair.wide_ids ? (std::int64_t{1} << 40) + 1 : -7);
        run.strays += id != -1 && (id < 0 || id >= shape.num_experts);
        run.ids[at][i] = id;
        run.weights[at][i] = static_cast<float>(below(1000)) * 0.001f;
      }
      run.narrow[at].assign(run.ids[at].begin(), run.ids[at].end());
      Routing routing;
      routing.experts = pair.wide_ids
                            ? TensorView::dense(run.ids[at].data(), DType::kI64, {pair.tokens[at], shape.top_k})
                            : TensorView::dense(run.narrow[at].data(), DType::kI32, {pair.tokens[at], shape.top_k});
      routing.weights = TensorView::dense(run.weights[at].data(), DType::kF32, {pair.tokens[at], shape.top_k});
      run.routing.push_back(routing);
      views.push_back(TensorView::dense(run.x[at].data(), DType::kBF16, {pair.tokens[at], shape.hidden}));
    }
    run.want =
        reference::low_latency_dispatch(shape, views, run.routing, {pair.dispatch.wire, pair.dispatch.round_scale});
    std::vector<ExpertSlabs> slabs;
    const bool small = pair.combine.wire == Wire::kLogFMT;
    for (int r = 0; r < ranks; ++r) {
      const auto at = static_cast<std::size_t>(r);
      const reference::Slabs& want = run.want[at];
      const std::int64_t rows = want.rows_per_expert;
      std::vector<std::uint16_t>& y = run.y[at];
      y.assign(static_cast<std::size_t>(want.local_experts * rows * shape.hidden),
               0xFFFF);  // a NaN where nobody may look
      std::uint16_t line[509];
      for (std::uint16_t& value : line) value = static_cast<std::uint16_t>(random_bf16(small ? 7 : 12));
      for (int e = 0; e < want.local_experts; ++e) {
        for (std::int64_t row = 0; row < want.counts[static_cast<std::size_t>(e)]; ++row) {
          std::uint16_t* const to = y.data() + (e * rows + row) * shape.hidden;
          const auto salt = static_cast<std::size_t>(below(509));
          for (std::int64_t h = 0; h < shape.hidden; ++h) to[h] = line[(static_cast<std::size_t>(h) + salt) % 509];
        }
      }
      ExpertSlabs in;
      in.x = TensorView::dense(y.data(), DType::kBF16, {want.local_experts, rows, shape.hidden});
      in.source = TensorView::dense(want.source.data(), DType::kI32, {want.local_experts, rows});
      in.range = TensorView::dense(want.range.data(), DType::kI64, {want.local_experts, ranks});
      slabs.push_back(in);
    }
    run.want_out = reference::low_latency_combine(shape, slabs, run.routing, {pair.combine.wire, pair.combine.exact});
    upload(run, slot);
  }

  void upload(Run& run, int slot) {
    const Shape& shape = run.pair.shape;
    for (int r = 0; r < world_.num_ranks(); ++r) {
      const auto at = static_cast<std::size_t>(r);
      CHECK_CUDA(cudaSetDevice(world_.at(r).device));
      Buffers& memory = buffers_[slot][at];
      memory.used = 0;
      Run::Device& d = run.device[at];
      const reference::Slabs& want = run.want[at];
      d.rows = static_cast<std::size_t>(want.local_experts * want.rows_per_expert);
      d.slab_bytes = d.rows * static_cast<std::size_t>(shape.hidden) * (run.pair.dispatch.wire == Wire::kBF16 ? 2 : 1);
      d.scale_words = d.rows * static_cast<std::size_t>(reference::scale_columns(run.pair.dispatch.wire, shape.hidden));
      d.x = memory.take<std::byte>(run.x[at].size() * 2);
      d.ids = memory.take<std::byte>(run.ids[at].size() * 8);
      d.weights = memory.take<std::byte>(run.weights[at].size() * 4);
      d.slab = memory.take<std::byte>(d.slab_bytes);
      d.scales = memory.take<std::uint32_t>(d.scale_words);
      d.y = memory.take<std::byte>(run.y[at].size() * 2);
      d.out = memory.take<std::byte>(run.want_out[at].size());
      d.counts = memory.take<std::int32_t>(want.counts.size());
      d.received = memory.take<std::int32_t>(want.counts.size());
      d.source = memory.take<std::int32_t>(d.rows);
      d.range = memory.take<std::int64_t>(want.range.size());
      d.table = memory.take<std::int32_t>(static_cast<std::size_t>(want.rows_per_expert * shape.top_k));
      d.waited = memory.take<unsigned long long>(cuda::kMaxRanks);
      CHECK_CUDA(cudaMemset(d.x, 0xFF, memory.used));
      CHECK_CUDA(cudaMemset(d.received, 0, want.counts.size() * 4));
      CHECK_CUDA(cudaMemset(d.waited, 0, cuda::kMaxRanks * 8));
      const auto put = [](void* to, const auto& from) {
        if (!from.empty())
          CHECK_CUDA(cudaMemcpy(to, from.data(), from.size() * sizeof from[0], cudaMemcpyHostToDevice));
      };
      put(d.x, run.x[at]);
      if (run.pair.wide_ids) {
        put(d.ids, run.ids[at]);
      } else {
        put(d.ids, run.narrow[at]);
      }
      put(d.weights, run.weights[at]);
      put(d.y, run.y[at]);
      CHECK_CUDA(cudaDeviceSynchronize());
    }
  }

  ll::RoutingParams routing_of(const Run& run, int r) {
    const Run::Device& d = run.device[static_cast<std::size_t>(r)];
    ll::RoutingParams routing;
    routing.experts = d.ids;
    routing.wide_ids = run.pair.wide_ids;
    routing.weights = reinterpret_cast<const float*>(d.weights);
    routing.num_tokens = run.pair.tokens[static_cast<std::size_t>(r)];
    return routing;
  }

  void dispatch(const Run& run, int r, int halves, int turns_back = 0) {
    const Shape& shape = run.pair.shape;
    const Run::Device& d = run.device[static_cast<std::size_t>(r)];
    const reference::Slabs& want = run.want[static_cast<std::size_t>(r)];
    ll::DispatchParams p;
    p.call = world_.call(r, shape, 4u + static_cast<unsigned>(run.pair.dispatch.wire));
    p.call.halves = halves;
    p.call.turns_back = turns_back;
    p.call.hook = run.pair.dispatch.hook;
    p.call.routing = routing_of(run, r);
    p.call.waited = d.waited;
    p.wire = run.pair.dispatch.wire;
    p.round_scale = run.pair.dispatch.round_scale;
    p.x = d.x;
    p.x_row_stride = shape.hidden * 2;
    p.slab = d.slab;
    p.scales = d.scales;
    const std::int64_t columns = reference::scale_columns(p.wire, shape.hidden);
    p.scale_expert_stride = columns * want.rows_per_expert;
    p.scale_row_stride = 1;
    p.scale_column_stride = want.rows_per_expert;
    p.counts = d.counts;
    p.source = d.source;
    p.range = d.range;
    p.received = d.received;
    p.rows = d.table;
    CHECK_CUDA(cudaSetDevice(world_.at(r).device));
    ll::launch_dispatch(p, sms(run.pair.dispatch), run.pair.dispatch.early, world_.at(r).stream);
  }

  void combine(const Run& run, int r, int halves, int turns_back = 0) {
    const Shape& shape = run.pair.shape;
    const Run::Device& d = run.device[static_cast<std::size_t>(r)];
    const reference::Slabs& want = run.want[static_cast<std::size_t>(r)];
    ll::CombineParams p;
    p.call = world_.call(r, shape, 10u + static_cast<unsigned>(run.pair.combine.hook));
    p.call.halves = halves;
    p.call.turns_back = turns_back;
    p.call.hook = run.pair.combine.hook;
    p.call.routing = routing_of(run, r);
    p.call.waited = d.waited;
    p.wire = run.pair.combine.wire;
    p.exact = run.pair.combine.exact;
    p.x = d.y;
    p.x_row_stride = shape.hidden * 2;
    p.x_expert_stride = want.rows_per_expert * p.x_row_stride;
    // A lone expert's stride says nothing but how large its slabs could be: kernels that count their rows in 32 bits leave them to others.
    if (want.local_experts == 1 && run.pair.combine.far_slabs) p.x_expert_stride = std::int64_t{1} << 37;
    p.rows = d.table;
    p.out = d.out;
    p.out_row_stride = shape.hidden * 2;
    CHECK_CUDA(cudaSetDevice(world_.at(r).device));
    if (run.pair.combine.find_rows && (halves & ll::kSend) != 0) {
      ll::FindRowsParams find;
      find.source = d.source;
      find.range = d.range;
      find.num_ranks = world_.num_ranks();
      find.num_local_experts = want.local_experts;
      find.max_tokens = static_cast<int>(shape.max_tokens);
      find.top_k = shape.top_k;
      find.rows = d.table;
      ll::launch_find_rows(find, sms(run.pair.combine), world_.at(r).stream);
    }
    ll::launch_combine(p, sms(run.pair.combine), run.pair.combine.early, world_.at(r).stream);
  }

  /// Ranks that share a GPU leave room for each other.
  int sms(const Options& options) const {
    const int share = cuda::device_traits().num_sms * world_.num_gpus() / world_.num_ranks();
    return options.num_sms == 0 ? share : std::min(options.num_sms, share);
  }

  template <class T>
  std::vector<T> fetch(const void* from, std::size_t count) {
    std::vector<T> values(count);
    if (count > 0) CHECK_CUDA(cudaMemcpy(values.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

  bool fail(const Run& run, int r, const char* what, long long index, long long got, long long want) {
    std::printf("FAIL rank %d: %s[%lld] = %llx, want %llx; %s\n", r, what, index, got, want, text_of(run.pair).c_str());
    std::fflush(stdout);
    return false;
  }

  bool check_dispatch(const Run& run) {
    const Shape& shape = run.pair.shape;
    for (int r = 0; r < world_.num_ranks(); ++r) {
      const auto at = static_cast<std::size_t>(r);
      CHECK_CUDA(cudaSetDevice(world_.at(r).device));
      const reference::Slabs& want = run.want[at];
      const Run::Device& d = run.device[at];
      const auto counts = fetch<std::int32_t>(d.counts, want.counts.size());
      const auto received = fetch<std::int32_t>(d.received, want.counts.size());
      const auto range = fetch<std::int64_t>(d.range, want.range.size());
      for (std::size_t i = 0; i < counts.size(); ++i) {
        if (counts[i] != want.counts[i])
          return fail(run, r, "counts", static_cast<long long>(i), counts[i], want.counts[i]);
        if (received[i] != want.counts[i])
          return fail(run, r, "received", static_cast<long long>(i), received[i], want.counts[i]);
      }
      for (std::size_t i = 0; i < range.size(); ++i) {
        if (range[i] != want.range[i]) return fail(run, r, "range", static_cast<long long>(i), range[i], want.range[i]);
      }
      const auto source = fetch<std::int32_t>(d.source, d.rows);
      const auto slab = fetch<std::byte>(d.slab, d.slab_bytes);
      const auto scales = fetch<std::uint32_t>(d.scales, d.scale_words);
      const std::size_t width = d.rows == 0 ? 0 : d.slab_bytes / d.rows;
      const std::int64_t columns = reference::scale_columns(run.pair.dispatch.wire, shape.hidden);
      for (int e = 0; e < want.local_experts; ++e) {
        for (std::int64_t row = 0; row < want.counts[static_cast<std::size_t>(e)]; ++row) {
          const auto index = static_cast<std::size_t>(e * want.rows_per_expert + row);
          if (source[index] != want.source[index])
            return fail(run, r, "source", static_cast<long long>(index), source[index], want.source[index]);
          for (std::size_t b = 0; b < width; ++b) {
            const std::size_t byte = index * width + b;
            if (slab[byte] != want.x[byte])
              return fail(run, r, "slab", static_cast<long long>(byte), static_cast<int>(slab[byte]),
                          static_cast<int>(want.x[byte]));
          }
          for (std::int64_t c = 0; c < columns; ++c) {
            const std::int64_t word = (e * columns + c) * want.rows_per_expert + row;
            std::uint32_t value;
            std::memcpy(&value, want.scales.data() + word * 4, 4);
            if (scales[static_cast<std::size_t>(word)] != value)
              return fail(run, r, "scale", word, scales[static_cast<std::size_t>(word)], value);
          }
        }
      }
    }
    return true;
  }

  bool check_combine(const Run& run) {
    for (int r = 0; r < world_.num_ranks(); ++r) {
      const auto at = static_cast<std::size_t>(r);
      CHECK_CUDA(cudaSetDevice(world_.at(r).device));
      const auto out = fetch<std::uint16_t>(run.device[at].out, run.want_out[at].size() / 2);
      for (std::size_t i = 0; i < out.size(); ++i) {
        std::uint16_t want;
        std::memcpy(&want, run.want_out[at].data() + i * 2, 2);
        if (out[i] != want) return fail(run, r, "out", static_cast<long long>(i), out[i], want);
      }
    }
    return true;
  }

  void maybe_late(int percent) {
    if (!chance(percent)) return;
    Rank& rank = world_.at(below(world_.num_ranks()));
    CHECK_CUDA(cudaSetDevice(rank.device));
    kLinger({.blocks = 1, .threads = 1, .stream = rank.stream}, {static_cast<std::uint64_t>(below(200'000))});
  }

  bool settled(const char* what) {
    world_.synchronize();
    if (world_.failed() < 0) return true;
    std::printf("FAIL: a record was left in %s\n", what);
    world_.print_records();
    return false;
  }

  /// Puts a pair into the streams, half by half or at once. `late`: percent more that a rank is late.
  void launch(const Run& run, int late) {
    const Pair& pair = run.pair;
    maybe_late(30 + late);
    const auto all = [&](auto&& op) {
      for (int r = 0; r < world_.num_ranks(); ++r) op(r);
    };
    if (pair.dispatch.hook) {
      all([&](int r) { dispatch(run, r, ll::kSend); });
      maybe_late(20);
      all([&](int r) { dispatch(run, r, ll::kReceive); });
    } else {
      all([&](int r) { dispatch(run, r, ll::kSend | ll::kReceive); });
    }
    maybe_late(20 + late);
    if (pair.combine.hook) {
      all([&](int r) { combine(run, r, ll::kSend); });
      maybe_late(20);
      all([&](int r) { combine(run, r, ll::kReceive); });
    } else {
      all([&](int r) { combine(run, r, ll::kSend | ll::kReceive); });
    }
  }

  /// One pair, checked.
  bool one_pair(const Pair& pair, int late = 0) {
    Run run;
    prepare(run, pair, 0);
    launch(run, late);
    return is_right(run);
  }

  /// The same pair again and again, checked after the last time.
  bool many_pairs(const Pair& pair, int times) {
    Run run;
    prepare(run, pair, 0);
    for (int i = 1; i < times; ++i) {
      launch(run, -25);
      if (chance(30)) world_.synchronize();
    }
    world_.synchronize();
    forget_received(run);
    launch(run, 0);
    return is_right(run);
  }

  bool is_right(const Run& run) {
    if (settled("a pair")) return check_dispatch(run) && check_combine(run);
    std::printf("  %s\n", text_of(run.pair).c_str());
    return false;
  }

  /// Nothing may run. Statistics are added to what is there.
  void forget_received(const Run& run) {
    for (int r = 0; r < world_.num_ranks(); ++r) {
      const auto at = static_cast<std::size_t>(r);
      CHECK_CUDA(cudaSetDevice(world_.at(r).device));
      CHECK_CUDA(cudaMemset(run.device[at].received, 0, run.want[at].counts.size() * sizeof(std::int32_t)));
      CHECK_CUDA(cudaDeviceSynchronize());
    }
  }

 private:
  World& world_;
  std::mt19937_64 random_;
  std::vector<Buffers> buffers_[2];
};

}  // namespace anyep::test
