// The checker of low-latency pairs against the oracle: what the oracle says passes, one wrong bit of it does not. On the host,
// and on a GPU where there is one: there the same functions run by warps.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "low_latency_draw.h"
#include "low_latency_pair_kernels.h"
#include "reference/low_latency.h"
#include "support/mirror.h"
#include "support/stream_graph.h"

namespace anyep::test {
namespace {

constexpr int kShapes = 1000;
constexpr std::uint32_t kReplay = 7;

/// kShapes of them. Slabs of many experts are larger than the limit even with one token each.
std::vector<PairDraw> small_pairs(std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<PairDraw> pairs;
  for (int i = 0; i < kShapes; ++i) {
    DrawLimits limits;
    limits.num_ranks = 1 + static_cast<int>(random() % 4);
    limits.most_tokens = 48;
    limits.most_elements = 1 << 18;
    pairs.push_back(draw_pair(random, limits));
  }
  return pairs;
}

/// What a rank's tensors of any of these pairs take.
std::size_t most_bytes(const std::vector<PairDraw>& pairs) {
  std::size_t most = 0;
  for (const PairDraw& pair : pairs) {
    PairCall call = pair.call;
    for (call.rank = 0; call.rank < call.num_ranks; ++call.rank) {
      most = std::max(most, PairPlaces(call, nullptr).bytes());
    }
  }
  return most;
}

template <class T>
void put(T* to, const std::vector<T>& from) {
  if (!from.empty()) std::memcpy(to, from.data(), from.size() * sizeof(T));
}

/// One pair on all ranks in host memory: what ranks bring by the checker's functions, what arrives by the oracle.
class OraclePair {
 public:
  explicit OraclePair(const PairDraw& pair) : pair_(pair) {
    for (int rank = 0; rank < pair.call.num_ranks; ++rank) {
      calls_.push_back(pair.call);
      calls_.back().rank = rank;
      memory_.emplace_back(PairPlaces(calls_.back(), nullptr).bytes());
      places_.push_back(PairPlaces(calls_.back(), memory_.back().data()).memory());
      bring(rank);
    }
    dispatch();
  }

  int num_ranks() const { return pair_.call.num_ranks; }
  const PairCall& call(int rank) const { return calls_[static_cast<std::size_t>(rank)]; }
  std::vector<std::byte>& bytes(int rank) { return memory_[static_cast<std::size_t>(rank)]; }
  /// With this place for findings.
  PairMemory memory(int rank, Findings& findings) const {
    PairMemory memory = places_[static_cast<std::size_t>(rank)];
    memory.findings = &findings;
    return memory;
  }

  /// Checks a rank's slabs and fills in its answers, as the kernel does.
  void check_dispatched(int rank, Findings& findings) const {
    const PairMemory m = memory(rank, findings);
    const Contents contents(call(rank), kReplay);
    std::vector<std::int32_t> origins(PairCall::kMostRows);
    for (int local = 0; local < call(rank).experts_of(rank).count; ++local) {
      const int count = list_rows(Alone(), contents, local, origins.data(), [&](int from, int begin, int of_source) {
        check_range(call(rank), m, local, from, begin, of_source);
      });
      find(findings, Field::kCounts, call(rank).salt, local, 0, 0, static_cast<std::uint32_t>(m.counts[local]),
           static_cast<std::uint32_t>(count));
      for (int row = 0; row < count; ++row) {
        check_row(Alone(), contents, m, local, row, origins[static_cast<std::size_t>(row)]);
      }
    }
  }
  void check_combined(int rank, Findings& findings) const {
    const Contents contents(call(rank), kReplay);
    for (int token = 0; token < call(rank).tokens[rank]; ++token) {
      check_token(Alone(), contents, memory(rank, findings), token);
    }
  }

  /// All ranks have their answers.
  void combine() {
    std::vector<Routing> routing;
    std::vector<ExpertSlabs> slabs;
    for (int rank = 0; rank < num_ranks(); ++rank) {
      routing.push_back(routing_view(call(rank), places_[static_cast<std::size_t>(rank)]));
      slabs.push_back(answers_view(call(rank), places_[static_cast<std::size_t>(rank)]));
    }
    const auto out = reference::low_latency_combine(pair_.shape(), slabs, routing, {});
    for (int rank = 0; rank < num_ranks(); ++rank) {
      const auto at = static_cast<std::size_t>(rank);
      put(reinterpret_cast<std::byte*>(places_[at].out), out[at]);
    }
  }

  /// Puts the oracle's dispatch where check_dispatched() has overwritten it.
  void dispatch() {
    std::vector<Routing> routing;
    std::vector<TensorView> x;
    for (int rank = 0; rank < num_ranks(); ++rank) {
      routing.push_back(routing_view(call(rank), places_[static_cast<std::size_t>(rank)]));
      x.push_back(x_view(call(rank), places_[static_cast<std::size_t>(rank)]));
    }
    const auto slabs =
        reference::low_latency_dispatch(pair_.shape(), x, routing, {pair_.call.wire, pair_.call.round_scale});
    for (int rank = 0; rank < num_ranks(); ++rank) {
      const auto at = static_cast<std::size_t>(rank);
      const PairMemory& m = places_[at];
      put(m.slab, slabs[at].x);
      put(reinterpret_cast<std::byte*>(m.scales), slabs[at].scales);
      put(m.counts, slabs[at].counts);
      put(m.source, slabs[at].source);
      put(m.range, slabs[at].range);
    }
  }

  /// Flips a bit in the first row of some expert, or in the first sum. False: there is none.
  bool damage(int rank, Field field) {
    const PairCall& at = call(rank);
    PairMemory& m = places_[static_cast<std::size_t>(rank)];
    if (field == Field::kOut) {
      if (at.tokens[rank] > 0) m.out[0] ^= 0x100;
      return at.tokens[rank] > 0;
    }
    if (field == Field::kScale && at.wire == Wire::kBF16) return false;
    for (int local = 0; local < at.experts_of(rank).count; ++local) {
      if (m.counts[local] == 0) continue;
      const std::int64_t first = std::int64_t{local} * at.rows_per_expert();
      if (field == Field::kCounts) ++m.counts[local];
      if (field == Field::kRange) m.range[local * num_ranks()] ^= 1;
      if (field == Field::kSource) m.source[first] ^= 1;
      if (field == Field::kRow) m.slab[first * at.hidden * (at.wire == Wire::kBF16 ? 2 : 1)] ^= std::byte{1};
      const std::int64_t columns =
          at.wire == Wire::kUE8M0 ? core::num_packed_scales(at.hidden) : core::num_fp8_scales(at.hidden);
      if (field == Field::kScale) m.scales[first * columns] ^= 1;
      return true;
    }
    return false;
  }

  std::int64_t num_rows(int rank) const {
    std::int64_t rows = 0;
    for (int local = 0; local < call(rank).experts_of(rank).count; ++local) {
      rows += places_[static_cast<std::size_t>(rank)].counts[local];
    }
    return rows;
  }

 private:
  void bring(int rank) {
    const PairCall& at = call(rank);
    const PairMemory& m = places_[static_cast<std::size_t>(rank)];
    const Contents contents(at, kReplay);
    for (int token = 0; token < at.tokens[rank]; ++token) {
      for (int choice = 0; choice < at.top_k; ++choice) {
        const std::int64_t id = contents.id(rank, token, choice);
        const std::int64_t index = std::int64_t{token} * at.top_k + choice;
        if (at.wide_ids) {
          static_cast<std::int64_t*>(m.ids)[index] = id;
        } else {
          static_cast<std::int32_t*>(m.ids)[index] = static_cast<std::int32_t>(id);
        }
        m.weights[index] = contents.weight(rank, token, choice);
      }
      for (int column = 0; column < at.hidden; column += 4) {
        const Quad x = contents.x(rank, token, column);
        std::memcpy(m.x + std::int64_t{token} * at.hidden + column, x.at, sizeof x.at);
      }
    }
  }

  PairDraw pair_;
  std::vector<PairCall> calls_;
  std::vector<std::vector<std::byte>> memory_;
  std::vector<PairMemory> places_;
};

constexpr Field kDispatchFields[] = {Field::kCounts, Field::kRange, Field::kSource, Field::kRow, Field::kScale};

TEST(LowLatencyChecker, AgreesWithTheOracleOn1000Shapes) {
  const std::vector<PairDraw> draws = small_pairs(1);
  std::int64_t planted = 0;
  unsigned long long rows = 0, tokens = 0;
  for (int i = 0; i < kShapes; ++i) {
    OraclePair pair(draws[static_cast<std::size_t>(i)]);
    for (int rank = 0; rank < pair.num_ranks(); ++rank) {
      Findings findings{};
      pair.check_dispatched(rank, findings);
      ASSERT_EQ(findings.wrong, 0u) << "shape " << i << " field " << static_cast<int>(findings.field);
      ASSERT_EQ(findings.rows, static_cast<unsigned long long>(pair.num_rows(rank)));
      rows += findings.rows;
    }
    pair.combine();
    for (int rank = 0; rank < pair.num_ranks(); ++rank) {
      Findings findings{};
      pair.check_combined(rank, findings);
      ASSERT_EQ(findings.wrong, 0u) << "shape " << i;
      ASSERT_EQ(findings.tokens, static_cast<unsigned long long>(pair.call(rank).tokens[rank]));
      tokens += findings.tokens;
    }
    const int rank = i % pair.num_ranks();
    Findings findings{};
    if (pair.damage(rank, Field::kOut)) {
      pair.check_combined(rank, findings);
      ASSERT_GE(findings.wrong, 1u) << "shape " << i;
      ++planted;
    }
    pair.dispatch();
    findings = {};
    const Field field = kDispatchFields[i % 5];
    if (pair.damage(rank, field)) {
      pair.check_dispatched(rank, findings);
      ASSERT_GE(findings.wrong, 1u) << "shape " << i << " field " << static_cast<int>(field);
      ++planted;
    }
  }
  EXPECT_GE(planted, kShapes / 2);
  EXPECT_GE(rows, 10'000u);
  EXPECT_GE(tokens, 10'000u);
}

/// A rank's pair on the GPU, its tensors beside the host's. Room for `most_bytes` of them.
class DevicePair {
 public:
  explicit DevicePair(std::size_t most_bytes) : bytes_(most_bytes) {
    void* memory = nullptr;
    must(cudaMalloc(&memory, bytes_ + sizeof(Findings) + 8));
    base_ = static_cast<std::byte*>(memory);
    must(cudaMemcpy(replay(), &kReplay, sizeof kReplay, cudaMemcpyHostToDevice));
  }
  ~DevicePair() { (void)cudaFree(base_); }
  DevicePair(const DevicePair&) = delete;
  DevicePair& operator=(const DevicePair&) = delete;

  PairMemory memory(const PairCall& call) {
    PairMemory memory = PairPlaces(call, base_).memory();
    memory.replay = replay();
    memory.findings = reinterpret_cast<Findings*>(base_ + bytes_);
    return memory;
  }
  void upload(const std::vector<std::byte>& bytes) {
    if (bytes.size() > bytes_) {
      throw std::invalid_argument("a pair of " + std::to_string(bytes.size()) + " bytes; there is room for " +
                                  std::to_string(bytes_));
    }
    must(cudaMemcpy(base_, bytes.data(), bytes.size(), cudaMemcpyHostToDevice));
    must(cudaMemset(base_ + bytes_, 0, sizeof(Findings)));
  }
  void download(std::vector<std::byte>& bytes) const {
    must(cudaMemcpy(bytes.data(), base_, bytes.size(), cudaMemcpyDeviceToHost));
  }
  Findings findings() const {
    Findings found;
    must(cudaMemcpy(&found, base_ + bytes_, sizeof found, cudaMemcpyDeviceToHost));
    return found;
  }

 private:
  std::uint32_t* replay() const { return reinterpret_cast<std::uint32_t*>(base_ + bytes_ + sizeof(Findings)); }
  std::size_t bytes_;  ///< findings lie behind them, aligned as places are
  std::byte* base_ = nullptr;
};

TEST(LowLatencyChecker, OnTheGpuAgreesWithTheOracleOn1000Shapes) {
  if (num_gpus() == 0) GTEST_SKIP() << "no GPU";
  must(cudaSetDevice(0));
  const std::vector<PairDraw> draws = small_pairs(2);
  DevicePair device(most_bytes(draws));
  std::int64_t planted = 0;
  for (int i = 0; i < kShapes; ++i) {
    OraclePair pair(draws[static_cast<std::size_t>(i)]);
    const int rank = i % pair.num_ranks();
    const PairCall& call = pair.call(rank);
    const PairMemory memory = device.memory(call);
    // What the GPU brings is what the oracle was given.
    std::vector<std::byte> brought(pair.bytes(rank).size());
    device.upload(brought);
    prepare_pair(call, memory, nullptr);
    device.download(brought);
    const auto inputs =
        static_cast<std::size_t>(PairPlaces(call, nullptr).memory().slab - static_cast<std::byte*>(nullptr));
    ASSERT_EQ(std::memcmp(brought.data(), pair.bytes(rank).data(), inputs), 0) << "shape " << i;

    device.upload(pair.bytes(rank));
    check_dispatched(call, memory, nullptr);
    Findings found = device.findings();
    ASSERT_EQ(found.wrong, 0u) << "shape " << i << " field " << static_cast<int>(found.field);
    ASSERT_EQ(found.rows, static_cast<unsigned long long>(pair.num_rows(rank)));
    const Field field = kDispatchFields[i % 5];
    if (pair.num_rows(rank) > 0 && (field != Field::kScale || call.wire != Wire::kBF16)) {
      device.upload(pair.bytes(rank));
      damage(call, memory, field, nullptr);
      check_dispatched(call, memory, nullptr);
      ASSERT_GE(device.findings().wrong, 1u) << "shape " << i << " field " << static_cast<int>(field);
      ++planted;
    }
    for (int at = 0; at < pair.num_ranks(); ++at) {
      Findings of_host{};
      pair.check_dispatched(at, of_host);  // fills the answers in
    }
    pair.combine();
    device.upload(pair.bytes(rank));
    check_combined(call, memory, nullptr);
    found = device.findings();
    ASSERT_EQ(found.wrong, 0u) << "shape " << i;
    ASSERT_EQ(found.tokens, static_cast<unsigned long long>(call.tokens[rank]));
    if (call.tokens[rank] > 0) {
      damage(call, memory, Field::kOut, nullptr);
      check_combined(call, memory, nullptr);
      ASSERT_GE(device.findings().wrong, 1u) << "shape " << i;
      ++planted;
    }
  }
  EXPECT_GE(planted, kShapes / 2);
}

}  // namespace
}  // namespace anyep::test
