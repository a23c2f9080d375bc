// The checker of exchanges against the oracle: what the oracle says passes, one wrong bit of it does not. On the host, and on a
// GPU where there is one: there the same functions run by warps.
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "exchange_draw.h"
#include "exchange_kernels.h"
#include "reference/high_throughput.h"
#include "support/mirror.h"
#include "support/stream_graph.h"

namespace anyep::test {
namespace {

constexpr int kShapes = 1000;
constexpr std::uint32_t kReplay = 5;

/// One exchange on all ranks: inputs by the checker's functions, the rest by the oracle.
class OracleExchange {
 public:
  explicit OracleExchange(std::uint64_t seed) {
    const int ranks = 1 + static_cast<int>(seed % 4);
    for (int rank = 0; rank < ranks; ++rank) {
      Exchange e = draw_exchange(seed, ranks, rank).e;
      e.hidden = 8 + e.hidden % 120 / 8 * 8;  // the oracle takes its time
      for (int& tokens : e.tokens) tokens %= 65;
      all_.push_back(e);
    }
    const auto count = static_cast<std::size_t>(ranks);
    ids.resize(count), x.resize(count), rows.resize(count), out.resize(count);
    std::vector<Routing> routing(count);
    std::vector<Rows> in(count);
    for (int rank = 0; rank < ranks; ++rank) {
      const auto at = static_cast<std::size_t>(rank);
      bring(rank);
      const std::int64_t tokens = all_[at].tokens[rank];
      routing[at].experts = TensorView::dense(ids[at].data(), DType::kI64, {tokens, all_[at].top_k});
      in[at].x = TensorView::dense(x[at].data(), DType::kBF16, {tokens, all_[at].hidden});
    }
    routes = reference::route(all_[0].num_experts, routing);
    const auto received = reference::dispatch(routes, in);
    std::vector<CombineInput> back(count);
    for (std::size_t at = 0; at < count; ++at) {
      rows[at].resize(received[at].x.size() / 2);
      if (!rows[at].empty()) std::memcpy(rows[at].data(), received[at].x.data(), received[at].x.size());
      back[at].x = TensorView::dense(rows[at].data(), DType::kBF16, {received[at].num_rows, all_[at].hidden});
    }
    const auto combined = reference::combine(routes, back);
    for (std::size_t at = 0; at < count; ++at) {
      out[at].resize(combined[at].x.size() / 2);
      if (!out[at].empty()) std::memcpy(out[at].data(), combined[at].x.data(), combined[at].x.size());
    }
  }

  int num_ranks() const { return static_cast<int>(all_.size()); }
  const Exchange& of(int rank) const { return all_[static_cast<std::size_t>(rank)]; }
  ExchangeMemory memory(int rank, Findings& findings) {
    const auto at = static_cast<std::size_t>(rank);
    ExchangeMemory memory;
    memory.ids = ids[at].data();
    memory.x = x[at].data();
    memory.rows = rows[at].data();
    memory.out = out[at].data();
    memory.rows_until = routes[at].rows_until.data();
    memory.source = routes[at].source.data();
    memory.findings = &findings;
    return memory;
  }

  Findings check_on_host(int rank) {
    Findings findings{};
    const ExchangeMemory m = memory(rank, findings);
    const ExchangeContents contents(of(rank), kReplay);
    std::vector<std::int32_t> tokens(Exchange::kMostTokens);
    int row = 0;
    for (int from = 0; from < num_ranks(); ++from) {
      const int count = list_tokens(Alone(), contents, from, tokens.data());
      find(findings, Field::kCounts, of(rank).salt, from, 0, 0, static_cast<std::uint32_t>(m.rows_until[from]),
           static_cast<std::uint32_t>(row + count));
      for (int i = 0; i < count; ++i, ++row) {
        check_row(Alone(), contents, m, from, row, tokens[static_cast<std::size_t>(i)]);
      }
    }
    for (int token = 0; token < of(rank).tokens[rank]; ++token) check_sum(Alone(), contents, m, token);
    return findings;
  }

  /// Changes what the oracle said in one place, or puts it back. False: there is no such place.
  bool damage(int rank, Field field) {
    const auto at = static_cast<std::size_t>(rank);
    if (rows[at].empty() || out[at].empty()) return false;
    if (field == Field::kCounts) routes[at].rows_until[0] ^= 1;
    if (field == Field::kSource)
      routes[at].source[rows[at].size() / static_cast<std::size_t>(of(rank).hidden) / 2] ^= 1;
    if (field == Field::kRow) rows[at][rows[at].size() / 2] ^= 0x40;
    if (field == Field::kOut) out[at].back() ^= 0x40;
    return true;
  }

  std::vector<std::vector<std::int64_t>> ids;
  std::vector<std::vector<std::uint16_t>> x, rows, out;
  std::vector<reference::Route> routes;

 private:
  void bring(int rank) {
    const auto at = static_cast<std::size_t>(rank);
    const Exchange& e = all_[at];
    const ExchangeContents contents(e, kReplay);
    for (int token = 0; token < e.tokens[rank]; ++token) {
      for (int choice = 0; choice < e.top_k; ++choice) ids[at].push_back(contents.id(rank, token, choice));
      for (int c = 0; c < e.hidden; ++c) x[at].push_back(ExchangeContents::x(contents.seed_of(rank, token), c));
    }
  }
  std::vector<Exchange> all_;
};

constexpr Field kFields[] = {Field::kCounts, Field::kSource, Field::kRow, Field::kOut};

TEST(ExchangeChecker, AgreesWithTheOracleOn1000Shapes) {
  int planted = 0;
  unsigned long long rows = 0;
  for (std::uint64_t i = 0; i < kShapes; ++i) {
    OracleExchange exchange(i + 1);
    for (int rank = 0; rank < exchange.num_ranks(); ++rank) {
      const Findings found = exchange.check_on_host(rank);
      ASSERT_EQ(found.wrong, 0u) << "shape " << i << ": " << text_of(found);
      ASSERT_EQ(found.rows, exchange.routes[static_cast<std::size_t>(rank)].source.size());
      rows += found.rows;
      if (!exchange.damage(rank, kFields[i % 4])) continue;
      ASSERT_GE(exchange.check_on_host(rank).wrong, 1u) << "shape " << i;
      exchange.damage(rank, kFields[i % 4]);
      ++planted;
    }
  }
  EXPECT_GE(planted, kShapes / 2);
  EXPECT_GE(rows, 10'000u);
}

/// Arrays on the GPU, one behind the other.
class DeviceArrays {
 public:
  static constexpr std::size_t kBytes = std::size_t{8} << 20;
  DeviceArrays() {
    void* memory = nullptr;
    must(cudaMalloc(&memory, kBytes));
    base_ = static_cast<std::byte*>(memory);
  }
  ~DeviceArrays() { (void)cudaFree(base_); }
  DeviceArrays(const DeviceArrays&) = delete;
  DeviceArrays& operator=(const DeviceArrays&) = delete;
  void clear() { used_ = 0; }
  template <class T>
  T* put(const T* from, std::size_t count) {
    std::byte* const at = base_ + used_;
    used_ = (used_ + count * sizeof(T) + 255) / 256 * 256;
    if (used_ > kBytes) throw std::runtime_error("the exchange does not fit");
    if (count > 0) must(cudaMemcpy(at, from, count * sizeof(T), cudaMemcpyHostToDevice));
    return reinterpret_cast<T*>(at);
  }

 private:
  std::byte* base_ = nullptr;
  std::size_t used_ = 0;
};

TEST(ExchangeChecker, OnTheGpuAgreesWithTheOracleOn1000Shapes) {
  if (num_gpus() == 0) GTEST_SKIP() << "no GPU";
  must(cudaSetDevice(0));
  DeviceArrays arrays;
  int planted = 0;
  for (std::uint64_t i = 0; i < kShapes; ++i) {
    OracleExchange exchange(i + 1);
    const int rank = static_cast<int>(i) % exchange.num_ranks();
    const auto at = static_cast<std::size_t>(rank);
    const Exchange& e = exchange.of(rank);
    const auto check = [&] {
      arrays.clear();
      const Findings none{};
      ExchangeMemory m;
      m.replay = arrays.put(&kReplay, 1);
      m.findings = arrays.put(&none, 1);
      m.rows = arrays.put(exchange.rows[at].data(), exchange.rows[at].size());
      m.rows_until = arrays.put(exchange.routes[at].rows_until.data(), exchange.routes[at].rows_until.size());
      m.source = arrays.put(exchange.routes[at].source.data(), exchange.routes[at].source.size());
      m.out = arrays.put(exchange.out[at].data(), exchange.out[at].size());
      check_received(e, m, nullptr);
      check_sums(e, m, nullptr);
      Findings found;
      must(cudaMemcpy(&found, m.findings, sizeof found, cudaMemcpyDeviceToHost));
      return found;
    };
    const Findings found = check();
    ASSERT_EQ(found.wrong, 0u) << "shape " << i << ": " << text_of(found);
    ASSERT_EQ(found.rows, exchange.routes[at].source.size());
    ASSERT_EQ(found.tokens, static_cast<unsigned long long>(e.tokens[rank]));
    if (exchange.damage(rank, kFields[i % 4])) {
      ASSERT_GE(check().wrong, 1u) << "shape " << i;
      exchange.damage(rank, kFields[i % 4]);
      ++planted;
    }
    // What the GPU brings is what the oracle was given.
    ExchangeMemory m;
    arrays.clear();
    m.replay = arrays.put(&kReplay, 1);
    m.ids = arrays.put(exchange.ids[at].data(), exchange.ids[at].size());
    m.x = arrays.put(exchange.out[at].data(), exchange.out[at].size());
    m.out = arrays.put(exchange.out[at].data(), exchange.out[at].size());
    prepare_exchange(e, m, nullptr);
    std::vector<std::uint16_t> x(exchange.x[at].size());
    std::vector<std::int64_t> ids(exchange.ids[at].size());
    must(cudaMemcpy(x.data(), m.x, x.size() * sizeof x[0], cudaMemcpyDeviceToHost));
    must(cudaMemcpy(ids.data(), m.ids, ids.size() * sizeof ids[0], cudaMemcpyDeviceToHost));
    ASSERT_EQ(x, exchange.x[at]) << "shape " << i;
    ASSERT_EQ(ids, exchange.ids[at]) << "shape " << i;
  }
  EXPECT_GE(planted, kShapes / 8);
}

}  // namespace
}  // namespace anyep::test
