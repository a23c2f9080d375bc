// Which way of sharing memory a group takes, from what its ranks say.
#include "cuda/memory/sharing.h"

#include <anyep/error.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "tests/unit/thrown.h"

namespace anyep::cuda {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::vector<GpuNote> good_gpus(int count) {
  GpuNote note;
  note.descriptors = note.host_pages = true;
  note.fabric = true;
  note.granularity = 2 << 20;
  return std::vector<GpuNote>(static_cast<std::size_t>(count), note);
}

TEST(CudaSharing, TakesDescriptorsFirst) {
  const Choice choice = choose_sharing(good_gpus(2));
  EXPECT_THAT(choice.order, ElementsAre(Sharing::kDescriptors, Sharing::kIpc, Sharing::kHostMemory));
  EXPECT_EQ(choice.reason, "");
}

TEST(CudaSharing, OneRankWithoutDescriptorsTakesAllOfThemToIpc) {
  auto notes = good_gpus(4);
  notes[2].descriptors = false;
  const Choice choice = choose_sharing(notes);
  EXPECT_THAT(choice.order, ElementsAre(Sharing::kIpc, Sharing::kHostMemory));
  EXPECT_THAT(choice.reason, HasSubstr("rank 2"));
}

TEST(CudaSharing, OnePairWithoutPeerAccessTakesAllOfThemToHostMemory) {
  auto notes = good_gpus(4);
  notes[1].unreachable = 1u << 3;
  const Choice choice = choose_sharing(notes);
  EXPECT_THAT(choice.order, ElementsAre(Sharing::kHostMemory));
  EXPECT_THAT(choice.reason, HasSubstr("ranks 1 and 3"));
}

TEST(CudaSharing, HostMemoryMayBeForcedByOneRank) {
  auto notes = good_gpus(3);
  notes[1].wish = Wish::kHostMemory;
  EXPECT_THAT(choose_sharing(notes).order, ElementsAre(Sharing::kHostMemory));
  EXPECT_EQ(choose_sharing(notes).reason, "ANYEP_PEER_ACCESS=0");
}

TEST(CudaSharing, AWishIsGrantedOrRefused) {
  auto notes = good_gpus(2);
  notes[0].wish = Wish::kIpc;
  EXPECT_THAT(choose_sharing(notes).order, ElementsAre(Sharing::kIpc));
  notes[0].wish = Wish::kFabric;
  EXPECT_THAT(choose_sharing(notes).order, ElementsAre(Sharing::kFabric));
  notes[1].fabric = false;
  EXPECT_EQ(test::thrown([&] { choose_sharing(notes); }).code, ErrorCode::kUnsupported);
  notes[0].wish = Wish::kDescriptors;
  EXPECT_THAT(choose_sharing(notes).order, ElementsAre(Sharing::kDescriptors));
  notes[1].unreachable = 1;
  const Error error = test::thrown([&] { choose_sharing(notes); });
  EXPECT_EQ(error.code, ErrorCode::kUnsupported);
  EXPECT_THAT(error.what(), HasSubstr("ranks 1 and 0 have no peer access"));
}

TEST(CudaSharing, DifferentWishesAreAMismatchThatNamesBoth) {
  auto notes = good_gpus(3);
  notes[0].wish = Wish::kIpc;
  notes[2].wish = Wish::kHostMemory;
  const Error error = test::thrown([&] { choose_sharing(notes); });
  EXPECT_EQ(error.code, ErrorCode::kMismatch);
  EXPECT_THAT(error.peers, ElementsAre(0, 2));
}

TEST(CudaSharing, WithoutAnyWayThePairIsNamed) {
  auto notes = good_gpus(2);
  notes[0].unreachable = 2;
  notes[1].host_pages = false;
  const Error error = test::thrown([&] { choose_sharing(notes); });
  EXPECT_EQ(error.code, ErrorCode::kUnsupported);
  EXPECT_THAT(error.what(), HasSubstr("ranks 0 and 1"));
}

TEST(CudaSharing, TheEnvironmentIsTheWish) {
  const auto wish = [](const char* memory, const char* peer_access) {
    setenv("ANYEP_CUDA_MEMORY", memory, 1);
    setenv("ANYEP_PEER_ACCESS", peer_access, 1);
    const Wish found = wish_from_environment();
    unsetenv("ANYEP_CUDA_MEMORY");
    unsetenv("ANYEP_PEER_ACCESS");
    return found;
  };
  EXPECT_EQ(wish("auto", "1"), Wish::kAny);
  EXPECT_EQ(wish("vmm", "1"), Wish::kDescriptors);
  EXPECT_EQ(wish("ipc", "1"), Wish::kIpc);
  EXPECT_EQ(wish("fabric", "1"), Wish::kFabric);
  EXPECT_EQ(wish("ipc", "0"), Wish::kHostMemory);
  EXPECT_EQ(test::thrown([&] { wish("nvlink", "1"); }).code, ErrorCode::kArgument);
  unsetenv("ANYEP_CUDA_MEMORY");
  unsetenv("ANYEP_PEER_ACCESS");
}

TEST(CudaSharing, ShapesAreWholeUnitsWithRoomToGrow) {
  constexpr std::uint64_t kMiB = 1 << 20, kGiB = kMiB << 10;
  const WindowShape small = WindowShape::of(3 * kMiB + 1, Sharing::kDescriptors, 2 * kMiB);
  EXPECT_EQ(small.bytes, 4 * kMiB);
  EXPECT_EQ(small.reserved, 32 * kMiB);
  const WindowShape large = WindowShape::of(40 * kGiB, Sharing::kHostMemory, 2 * kMiB);
  EXPECT_EQ(large.reserved, 104 * kGiB);
  const WindowShape fixed = WindowShape::of(kGiB, Sharing::kIpc, 2 * kMiB);
  EXPECT_EQ(fixed.reserved, fixed.bytes);
  EXPECT_EQ(WindowShape::of(0, Sharing::kDescriptors, 0).bytes, kPageBytes);
}

}  // namespace
}  // namespace anyep::cuda
