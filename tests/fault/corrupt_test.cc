// F14: bits that flip in the words, records and heads of a rank's window, at any time.
#include <anyep/engine.h>
#include <fmt/format.h>
#include <gmock/gmock.h>

#include <array>
#include <atomic>
#include <barrier>
#include <chrono>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "core/buffers.h"
#include "fault/notes.h"
#include "fault/task.h"

namespace anyep::test {
namespace {

constexpr int kRanks = 3;

#if defined(__SANITIZE_THREAD__)
constexpr bool kRacesAreReports = true;
#else
constexpr bool kRacesAreReports = false;
#endif

struct Range {
  std::uint64_t offset, bytes;
};

/// What lies in a window and is no payload: words, records, counts, token lists, heads of low-latency regions.
std::vector<Range> control_ranges(const core::WindowLayout& layout) {
  std::vector<Range> ranges = {{layout.doorbell, 4}, {layout.doorbell + 64, 4}, {layout.described, 64}};
  for (int peer = 0; peer < layout.num_ranks; ++peer) {
    for (const std::uint64_t array :
         {layout.announced, layout.barrier, layout.low_latency_arrived, layout.low_latency_asked}) {
      ranges.push_back({layout.word(array, peer), 8});
    }
    ranges.push_back({layout.grant_record(peer), sizeof(core::GrantRecord)});
    for (const core::Stream stream : {core::kStreamLists, core::kStreamDispatch, core::kStreamCombine}) {
      ranges.push_back({layout.word(layout.arrived[stream], peer), 8});
      ranges.push_back({layout.word(layout.credit[stream], peer), 8});
      for (const std::uint32_t turn : {0u, 1u}) {
        ranges.push_back({layout.offer_record(stream, peer, turn), sizeof(core::OfferRecord)});
      }
    }
    for (const std::uint32_t turn : {0u, 1u, 2u, 3u}) {
      ranges.push_back({layout.mailbox(peer, turn), 16});
      ranges.push_back({layout.low_latency_region(peer, turn), sizeof(core::LowLatencyHead) + 16});
    }
  }
  ranges.push_back({layout.counts, 2 * static_cast<std::uint64_t>(layout.num_ranks) * layout.count_width * 8});
  return ranges;
}

struct Trial {
  std::mt19937_64 random;
  std::chrono::microseconds pause;
  std::array<std::byte*, kRanks> windows{};
  std::array<std::string, kRanks> ends{};
  std::array<std::int64_t, kRanks> longest_ns{};
};

/// How a round ends; empty = well.
std::string round_of(Engine& engine, Task& task, int salt) {
  try {
    task.round(engine, salt);
  } catch (const Error& error) {
    return name_of(error.code);
  } catch (const std::runtime_error&) {
    return "wrong";  // bits of payload cannot be told from others
  }
  return "";
}

std::string play(Engine& engine, Task& task, std::int64_t& longest_ns) {
  for (int salt = 0; salt < 30; ++salt) {
    const std::int64_t start = now_ns();
    const std::string end = round_of(engine, task, salt);
    longest_ns = std::max(longest_ns, now_ns() - start);
    if (!end.empty()) return end;
  }
  return "right";
}

void run(Trial& trial) {
  const core::WindowLayout layout = core::WindowLayout::make(Task::budget(kRanks), kRanks);
  const std::vector<Range> ranges = control_ranges(layout);
  const LocalGroup group(kRanks);
  std::barrier ready(kRanks + 1), over(kRanks + 1);
  std::thread flips([&] {
    ready.arrive_and_wait();
    for (int flip = 0; flip < 40; ++flip) {
      std::this_thread::sleep_for(trial.pause);
      std::byte* const window = trial.windows[trial.random() % kRanks];
      const Range range = ranges[trial.random() % ranges.size()];
      auto* const byte = reinterpret_cast<unsigned char*>(window + range.offset + trial.random() % range.bytes);
      __atomic_fetch_xor(byte, static_cast<unsigned char>(1u << trial.random() % 8), __ATOMIC_RELAXED);
    }
    over.arrive_and_wait();
  });
  LocalGroup::run_threads(kRanks, [&](int rank) {
    const auto at = static_cast<std::size_t>(rank);
    const auto member = group.member(rank);
    Tuning tuning = Task::tuning();
    tuning.timeout = tuning.startup_timeout = std::chrono::milliseconds(100);
    const Topology topology = Topology::discover(*member);
    tuning.startup_timeout = std::chrono::seconds(20);
    Engine engine = Engine::create(Task::budget(kRanks), topology, tuning, *member);
    trial.windows[at] =
        engine.memory(Mode::kHighThroughput, 0, 1).as<std::byte>() - static_cast<std::ptrdiff_t>(layout.slots);
    Task task(kRanks, rank);
    // From its first op on the steady limit holds, which a busy machine may pass without a single flipped bit.
    trial.ends[at] = round_of(engine, task, 0);
    ready.arrive_and_wait();
    if (trial.ends[at].empty()) trial.ends[at] = play(engine, task, trial.longest_ns[at]);
    // A rank that is content with wrong numbers leaves, as one whose checks failed would.
    if (trial.ends[at] == "wrong") engine.abandon("wrong numbers");
    over.arrive_and_wait();  // nobody flips in memory that is gone
  });
  flips.join();
}

TEST(CorruptTest, BitsThatFlipInAWindowGiveErrorsAndNothingElse) {
  if (kRacesAreReports) GTEST_SKIP() << "flipped bits are races";
  std::mt19937_64 random(seed_of_test());
  std::map<std::string, int> ends;
  for (int repeat = 0; repeat < 40 * times_soak(50); ++repeat) {
    Trial trial;
    trial.random.seed(random());
    trial.pause = std::chrono::microseconds(20 << repeat % 6);
    run(trial);
    for (std::size_t rank = 0; rank < kRanks; ++rank) {
      ++ends[trial.ends[rank]];
      // Three ops of a round may each take the limit.
      EXPECT_LT(trial.longest_ns[rank], scaled_ns(1.5)) << "repeat " << repeat << ": " << trial.ends[rank];
    }
    if (HasFailure()) break;
  }
  const std::array<std::string, 8> known = {"right",    "wrong",    "kCorrupt",  "kMismatch",
                                            "kTimeout", "kAborted", "kCapacity", "kPeerDead"};
  std::string text;
  for (const auto& [end, count] : ends) {
    text += fmt::format(" {} {}", count, end);
    EXPECT_THAT(known, testing::Contains(end));
  }
  fmt::print("ranks that ended:{}\n", text);
  EXPECT_GT(ends["kCorrupt"] + ends["kMismatch"] + ends["kTimeout"], 0) << "nothing was hit";
}

}  // namespace
}  // namespace anyep::test
