// Row 60 of the bad-input table: a peer's memory by its descriptors.
#include <fcntl.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "host/memory.h"
#include "unit/thrown.h"

namespace anyep::host {
namespace {

using bootstrap::UniqueFd;
using test::thrown;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int kRanks = 3, kPeer = 1;
constexpr std::uint16_t kGeneration = 7;

core::WindowLayout layout() {
  return core::WindowLayout::make({.rows_bytes = 1 << 20, .low_latency_bytes = 1 << 20, .max_experts = 16}, kRanks);
}

/// A peer's memory, its header, and the import of both descriptors or of others in their place.
struct Peer {
  std::shared_ptr<RankMemory> memory = make_memory(layout(), kPeer, kGeneration);

  core::WindowHeader& header() const { return *reinterpret_cast<core::WindowHeader*>(memory->at(layout().header)); }
  int window() const { return memory->window_fd.get(); }
  int staging() const { return memory->staging_fd.get(); }
  std::shared_ptr<RankMemory> import() const { return import(window(), staging()); }
  static std::shared_ptr<RankMemory> import(int window_fd, int staging_fd) {
    return map_memory(layout(), kPeer, kGeneration, window_fd, staging_fd);
  }
};

void expect_corrupt(const std::string& what, int window_fd, int staging_fd) {
  const Error error = thrown([&] { Peer::import(window_fd, staging_fd); });
  EXPECT_EQ(error.code, ErrorCode::kCorrupt) << what << ": " << error.what();
  EXPECT_EQ(error.op, "create") << what;
  EXPECT_THAT(error.peers, ElementsAre(kPeer)) << what;
  EXPECT_THAT(error.what(), HasSubstr("rank 1")) << what;
}

TEST(MemoryImport, AWellFormedMemoryIsSharedBothWaysAndItsStagingIsReadOnly) {
  const Peer peer;
  const auto seen = peer.import();
  peer.memory->at(layout().heap)[0] = std::byte{42};
  EXPECT_EQ(seen->at(layout().heap)[0], std::byte{42});
  seen->at(layout().heap)[1] = std::byte{43};
  EXPECT_EQ(peer.memory->at(layout().heap)[1], std::byte{43});
  EXPECT_NE(::mprotect(seen->staging.data(), seen->staging.bytes(), PROT_READ | PROT_WRITE), 0)
      << "the seal keeps peers from making it writable";
}

TEST(MemoryImport, EveryFieldOfTheHeaderIsCompared) {
  const Peer peer;
  const core::WindowHeader right = peer.header();
  const auto expect_refused = [&](const char* what, auto change) {
    peer.header() = right;
    change(peer.header());
    expect_corrupt(what, peer.window(), peer.staging());
  };
  expect_refused("magic", [](auto& header) { header.magic ^= 1; });
  expect_refused("version", [](auto& header) { ++header.version; });
  expect_refused("more ranks", [](auto& header) { ++header.num_ranks; });
  expect_refused("no ranks", [](auto& header) { header.num_ranks = 0; });
  expect_refused("another rank's memory", [](auto& header) { header.rank = 2; });
  expect_refused("this rank's own memory", [](auto& header) { header.rank = 0; });
  expect_refused("a rank that is not there", [](auto& header) { header.rank = UINT32_MAX; });
  expect_refused("an older generation", [](auto& header) { --header.generation; });
  expect_refused("a generation of more than 16 bits", [](auto& header) { header.generation += 1u << 16; });
  expect_refused("more bytes", [](auto& header) { header.bytes += 4096; });
  expect_refused("no bytes", [](auto& header) { header.bytes = 0; });
  expect_refused("bytes beyond any memory", [](auto& header) { header.bytes = UINT64_MAX; });
  expect_refused("nothing", [](auto& header) { header = {}; });
  peer.header() = right;
  EXPECT_NO_THROW(peer.import());
}

// Any other 32 bytes: nothing but the right header is taken, and nothing is touched by what they say.
TEST(MemoryImport, AHeaderOfRandomBytesOrFlippedBitsIsRefused) {
  const Peer peer;
  const core::WindowHeader right = peer.header();
  static_assert(sizeof right == 32, "no padding: every bit counts");
  const auto seed = static_cast<std::uint64_t>(testing::UnitTest::GetInstance()->random_seed());
  SCOPED_TRACE(fmt::format("seed {} (--gtest_random_seed)", seed));
  std::mt19937_64 random(seed);
  for (int round = 0; round < 2000; ++round) {
    unsigned char bytes[sizeof right];
    std::memcpy(bytes, &right, sizeof right);
    if (round % 4 == 0) {
      for (unsigned char& byte : bytes) byte = static_cast<unsigned char>(random());
    } else {
      for (int flip = 0; flip <= round % 3; ++flip) {
        unsigned char& byte = bytes[random() % sizeof bytes];
        byte = static_cast<unsigned char>(byte ^ 1u << random() % 8);
      }
    }
    if (std::memcmp(bytes, &right, sizeof right) == 0) continue;  // flipped and flipped back
    std::memcpy(&peer.header(), bytes, sizeof bytes);
    expect_corrupt(fmt::format("round {}", round), peer.window(), peer.staging());
    if (HasFailure()) return;
  }
}

UniqueFd memfd_of(std::uint64_t bytes, int seals) {
  UniqueFd fd(::memfd_create("import-test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  EXPECT_EQ(::ftruncate(fd.get(), static_cast<off_t>(bytes)), 0);
  EXPECT_EQ(::fcntl(fd.get(), F_ADD_SEALS, seals), 0);
  return fd;
}

// The header of a memory that may shrink or is too small must not even be looked at: that would be SIGBUS.
TEST(MemoryImport, ADescriptorThatIsNoSealedMemfdOfTheRightSizeIsRefused) {
  const Peer peer;
  const std::uint64_t bytes = layout().bytes, staging = peer.memory->staging.bytes();
  constexpr int kSealed = F_SEAL_SHRINK | F_SEAL_GROW;
  const auto expect_refused = [&](const char* what, const UniqueFd& fd) {
    expect_corrupt(std::string("window: ") + what, fd.get(), peer.staging());
    expect_corrupt(std::string("staging: ") + what, peer.window(), fd.get());
  };
  expect_refused("none", UniqueFd());
  int ends[2];
  ASSERT_EQ(::pipe2(ends, O_CLOEXEC), 0);
  const UniqueFd reads(ends[0]), writes(ends[1]);
  expect_refused("a pipe", reads);
  expect_refused("a folder", UniqueFd(::open("/proc/self", O_RDONLY | O_DIRECTORY | O_CLOEXEC)));
  expect_refused("a device", UniqueFd(::open("/dev/zero", O_RDWR | O_CLOEXEC)));
  std::FILE* const file = std::tmpfile();
  ASSERT_NE(file, nullptr);
  ASSERT_EQ(::ftruncate(::fileno(file), static_cast<off_t>(bytes)), 0);
  expect_refused("a file", UniqueFd(::dup(::fileno(file))));
  std::fclose(file);
  for (const std::uint64_t right : {bytes, staging}) {
    expect_refused("unsealed", memfd_of(right, 0));
    expect_refused("may grow", memfd_of(right, F_SEAL_SHRINK));
    expect_refused("may shrink", memfd_of(right, F_SEAL_GROW));
    expect_refused("a page too small", memfd_of(right - 4096, kSealed));
    expect_refused("a page too large", memfd_of(right + 4096, kSealed));
  }
  expect_refused("empty", memfd_of(0, kSealed));
  expect_corrupt("the two exchanged", peer.staging(), peer.window());
  expect_corrupt("an empty window of the right size", memfd_of(bytes, kSealed).get(), peer.staging());
}

}  // namespace
}  // namespace anyep::host
